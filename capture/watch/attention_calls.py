"""Listening to `scaled_dot_product_attention`, wherever it is called from and however it was imported.

A `TorchFunctionMode` sees every call of a torch function in its thread, also of names bound before, and is
gone when its context is left. The call itself runs as it was made; what it was given is measured afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import WatchError
from ...kernels.attention import AttentionStatistics, attention_statistics
from .rows import Group, check_mask, unseen_padding

_ATTENTION = {
    # what torch.nn.functional and whoever imports from it call
    torch._C._nn.scaled_dot_product_attention,  # pyright: ignore[reportAttributeAccessIssue]
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


class Listener(TorchFunctionMode):
    """Reports every attention call, with its arguments, after it ran."""

    def __init__(self, on_attention: Callable[..., None]) -> None:
        super().__init__()
        self._on_attention = on_attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _ATTENTION:
            self._on_attention(*args, **(kwargs or {}))
        return output


@dataclass(frozen=True)
class AttentionCall:
    """One self-attention call over B rows, T queries and J keys, the last T of them the queries' own."""

    q_BHTC: Tensor
    k_BKJC: Tensor
    mask: Tensor | None  # [B or 1, H or 1, T or 1, J]
    is_causal: bool
    scale: float

    @property
    def past(self) -> int:
        """Number of keys before the first query's own: tokens in a cache."""
        return self.k_BKJC.shape[2] - self.q_BHTC.shape[2]

    def measure(self, group: Group, sink_tokens: int) -> AttentionStatistics:
        """Returns attention statistics of some rows' real tokens among themselves, in float32.

        Raises:
            WatchError: they do not keep among themselves.
        """
        J = self.k_BKJC.shape[2]
        mask = self.mask
        if mask is not None:
            check_mask(mask, group, self.past)
            mask = (mask if len(mask) == 1 else mask[group.rows])[..., group.keys]
            mask = mask if mask.shape[2] == 1 else mask[:, :, group.queries]
        elif self.is_causal and group.keys.start > 0:
            raise unseen_padding(group.rows[0], "attention is causal without a mask, and the padding is left")
        elif not self.is_causal and (group.keys.start > 0 or group.keys.stop < J):
            raise unseen_padding(group.rows[0], "attention runs without a mask")
        rows = slice(None) if len(group.rows) == len(self.q_BHTC) else group.rows
        return attention_statistics(
            self.q_BHTC[rows][:, :, group.queries],
            self.k_BKJC[rows][:, :, group.keys],
            scale=self.scale,
            mask=mask,
            is_causal=self.is_causal,
            sink_tokens=sink_tokens,
        )


def read_call(
    B: int,
    T: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """The arguments of `scaled_dot_product_attention` inside a block of B rows and T tokens, in one form.

    Raises:
        WatchError: a call whose attention matrix these arguments do not give, or that is not of the block's
            tokens; says which.
    """
    if query.is_nested or key.is_nested:
        raise WatchError(
            "attention of nested tensors cannot be watched: pad the batch, or run rows one by one"
        )
    if dropout_p > 0:
        raise WatchError(
            f"attention with dropout_p={dropout_p} cannot be watched, its matrix is drawn anew: call eval()"
        )
    if attn_mask is not None and is_causal:
        raise WatchError("attention with both attn_mask and is_causal cannot be watched: give one of them")
    if (
        attn_mask is not None
        and type(attn_mask) is not Tensor
        and not isinstance(attn_mask, torch.nn.Parameter)
    ):
        raise WatchError(
            f"attention with a {type(attn_mask).__name__} as attn_mask cannot be watched: give a plain tensor"
        )
    q, k = (x if x.ndim == 4 else x.unsqueeze(0) for x in (query, key))
    mask = attn_mask if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.ndim)]
    is_plain = q.ndim == k.ndim == 4
    if is_plain and q.shape[2] != T == 1 and not is_causal:
        q, mask = _unfold_heads(q, mask)
    is_own = is_plain and q.shape[2] == T <= k.shape[2] and max(len(q), len(k)) == B
    if not is_own or q.shape[1] % k.shape[1]:
        raise WatchError(
            f"attention has a query {list(query.shape)} and a key {list(key.shape)} in a block of {B} rows "
            f"and {T} tokens: [rows, heads, tokens, width] is wanted, of the block's own tokens"
            f"{_turned(q, B, T)}"
        )
    if is_causal and k.shape[2] != T:
        raise WatchError(
            f"attention is causal over {T} queries and {k.shape[2]} keys, so that it sees the first keys "
            "only: a static cache cannot be watched, use a dynamic one"
        )
    call = AttentionCall(
        q.expand(B, -1, -1, -1),
        k.expand(B, -1, -1, -1),
        None if mask is None else mask.expand(-1, -1, -1, k.shape[2]),
        bool(is_causal),
        q.shape[-1] ** -0.5 if scale is None else scale,
    )
    return _as_autocast(call)


def _turned(q: Tensor, B: int, T: int) -> str:
    """Returns what to add to a message if a block's residual has other axes than its attention."""
    if q.ndim == 4 and (len(q), q.shape[2]) == (T, B):
        return "; the residual is [tokens, rows, width], sequence first, which cannot be watched"
    if q.ndim == 4 and B == 1 and len(q) * q.shape[2] == T:
        return "; the residual is flattened, [rows · tokens, width], which cannot be watched"
    return ""


def _unfold_heads(q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns one token's query heads as heads, if given as queries of a key head (transformers' way)."""
    K, G = q.shape[1:3]
    if mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1):
        mask = mask.expand(-1, K, G, -1).flatten(1, 2).unsqueeze(2)
    return q.flatten(1, 2).unsqueeze(2), mask


def _as_autocast(call: AttentionCall) -> AttentionCall:
    """Rounds as autocast does before the attention, so that the same scores are measured."""
    kind = call.q_BHTC.device.type
    if not torch.is_autocast_enabled(kind):
        return call
    dtype = torch.get_autocast_dtype(kind)
    mask = call.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return replace(call, q_BHTC=call.q_BHTC.to(dtype), k_BKJC=call.k_BKJC.to(dtype), mask=mask)
