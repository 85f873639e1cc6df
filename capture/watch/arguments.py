"""What a forward pass was given: token ids, which tokens are real, how many are in a cache."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import WatchError

_NO_IDS = ("mask", "position", "label", "type")  # arguments that may be whole numbers too


class Arguments(NamedTuple):
    token_id_BT: Tensor | None
    """None where the module was given no ids."""
    mask_BT: Tensor | None
    """1 where a token is real; over the tokens of a cache too, if it is longer than the pass."""
    past: int | None
    """Tokens in the cache that was handed in, if there is one that says so."""


def read_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Finds them by name: `input_ids` or the first tensor of whole numbers, `attention_mask`,
    `past_key_values`.
    """
    named = list(_named(module, args, kwargs))
    by_name = {name: value for name, value in named if name is not None}
    cache: Any = by_name.get("past_key_values")
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None
    return Arguments(_token_ids(named), read_mask(by_name.get("attention_mask")), past)


def read_mask(mask: Any) -> Tensor | None:
    """An attention mask as [rows, tokens]; None for what says nothing of padding, such as [B, H, T, T].

    Raises:
        WatchError: it is [rows, tokens] and holds something else than 0 and 1.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
        return None
    mask_BT = mask.detach() if mask.ndim == 2 else mask.detach().unsqueeze(0)
    if not ((mask_BT == 0) | (mask_BT == 1)).all():
        raise WatchError(
            f"attention_mask {list(mask.shape)} holds other values than 0 and 1: give one number a token, 1 "
            "for real ones and 0 for padding"
        )
    return mask_BT != 0


def _named(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str | None, Any]]:
    """Every argument with its parameter's name, in order; None for one of *args."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    for index, value in enumerate(args):
        parameter = parameters[index] if index < len(parameters) else None
        is_named = parameter is not None and parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        )
        if not is_named:
            parameters = []  # the rest is *args too
        yield parameter.name if parameter is not None and is_named else None, value
    yield from kwargs.items()


def _token_ids(named: list[tuple[str | None, Any]]) -> Tensor | None:
    first = [value for name, value in named if name == "input_ids"]
    others = [value for name, value in named if not any(word in (name or "") for word in _NO_IDS)]
    if any(name == "inputs_embeds" and value is not None for name, value in named):
        others = []
    for value in (*first, *others):
        if isinstance(value, Tensor) and value.ndim in (1, 2) and _is_whole(value.dtype):
            return value.detach() if value.ndim == 2 else value.detach().unsqueeze(0)
    return None


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
