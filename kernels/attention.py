"""Attention that also says where each query looked, without a T×T matrix: causal over packed sequences, or
the statistics alone of any queries, keys and mask.

The packed forms are operations of torch.library: blocks of queries in PyTorch on a CPU
(`attention_blocks.py`), the kernels of `gpu/` on CUDA.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_blocks import (
    AttentionStatistics,
    attention_cpu,
    attention_with_statistics_cpu,
    one_length,
)
from .library import register


def make_cu_seqlens(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Returns where each of the packed sequences begins, and where the last one ends: int32 [S + 1]."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def attention(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens_S: Tensor, max_length: int, scale: float
) -> Tensor:
    """Returns causal attention of packed sequences, [N, H, C] in q's dtype; measures nothing.

    Args:
        q_NHC, k_NKC, v_NKC: packed along N; H is a multiple of K; bfloat16, float16 or float32.
        cu_seqlens_S: int32 [S + 1], see `make_cu_seqlens`. max_length: tokens of the longest, or more.
        scale: factor on the scores.
    """
    return _attention(q_NHC, k_NKC, v_NKC, cu_seqlens_S, max_length, scale)


def attention_with_statistics(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    sink_tokens: int = 1,
    *,
    columns: bool = True,
) -> tuple[Tensor, AttentionStatistics]:
    """Returns causal attention, and its statistics in float32 whatever the dtype of q, k and v.

    Args:
        sink_tokens: how many first keys of a sequence count as the sink. columns: whether what keys receive
            is wanted too; without it `received_NH` is empty. Others as for `attention`.
    Source: arXiv 2604.11791, section 4.1 (sink, mixing and ColSum scores); the centred entropy is ours.
    """
    o_NHC, *statistics = _attention_with_statistics(
        q_NHC, k_NKC, v_NKC, cu_seqlens_S, max_length, scale, sink_tokens, columns
    )
    return o_NHC, AttentionStatistics(*statistics)


def attention_statistics(
    q_BHTC: Tensor,
    k_BKJC: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    sink_tokens: int = 1,
) -> AttentionStatistics:
    """Returns what `attention_with_statistics` measures, of a padded batch under any mask, without an output.

    Args:
        q_BHTC, k_BKJC: B sequences of T queries and J keys; H is a multiple of K.
        mask: [B or 1, H or 1, T or 1, J]; boolean with True where a query sees a key, or added to the
            scaled scores. Every query must see a key.
        is_causal: instead of a mask: query i sees keys up to i, and T equals J.
    Returns:
        lse, entropy, peak and sink [B · T, H], received [B · J, H].
    """
    B, H, T, _ = q_BHTC.shape
    J = k_BKJC.shape[2]
    out = AttentionStatistics(
        *(torch.empty(B, n, H, dtype=torch.float32, device=q_BHTC.device) for n in (T, T, T, T, J))
    )
    assert not is_causal or (mask is None and T == J)
    if mask is not None:
        mask = mask.expand(-1, -1, T, J)
    q_GTHC, k_GJKC = q_BHTC.transpose(1, 2), k_BKJC.transpose(1, 2)
    one_length(q_GTHC, k_GJKC, scale, sink_tokens, out, mask=mask, is_causal=is_causal)
    return AttentionStatistics(*(x.flatten(0, 1) for x in out))


def _attention_fake(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens_S: Tensor, max_length: int, scale: float
) -> Tensor:
    return q_NHC.new_empty(q_NHC.shape)


def _attention_with_statistics_fake(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    sink_tokens: int,
    columns: bool,
) -> tuple[Tensor, ...]:
    N, H, _ = q_NHC.shape
    statistics = (q_NHC.new_empty(N, H, dtype=torch.float32) for _ in range(4))
    received = q_NHC.new_empty((N, H) if columns else (0,), dtype=torch.float32)
    return q_NHC.new_empty(q_NHC.shape), *statistics, received


_attention = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_length, float scale) -> Tensor",
    cpu=attention_cpu,
    fake=_attention_fake,
    gpu="attention",
)
_attention_with_statistics = register(
    "attention_with_statistics(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_length, "
    "float scale, int sink_tokens, bool columns) -> "
    "(Tensor o, Tensor lse, Tensor entropy, Tensor peak, Tensor sink, Tensor received)",
    cpu=attention_with_statistics_cpu,
    fake=_attention_with_statistics_fake,
    gpu="attention",
)
