"""Attention and its statistics on a CPU, a block of queries at a time past all of their keys.

Of each block the scores exist only until its statistics are taken, so extra memory is linear in T. With t the
scaled scores, m their row maximum and p = exp(t − m):

    l = Σp    lse = m + ln l    entropy = ln l − Σ p (t − m) / l    peak = 1 / l    sink = Σ_{j<s} p / l
    received_j = Σ_i p_ij / l_i

Both terms of the entropy are ≥ 0, so nothing cancels (lse − E[t] loses 1e-4 nats at large scores).
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# fewer make more calls, more compute more masked scores; least time of 32, 64, 128 and 256 at T = 512 to 2048
QUERIES_PER_BLOCK = 64
MASKED = -1e30  # finite: p · (t − m) must be 0 there, and 0 · inf is NaN


class AttentionStatistics(NamedTuple):
    """Float32 [N, H] each, of every query i (received: of every key j) of its own sequence.

    N counts queries, and in received keys; they differ only where a cache holds earlier keys.
    """

    lse_NH: Tensor  # ln Σ_j exp(score_ij)
    entropy_NH: Tensor  # −Σ_j A_ij ln A_ij, nats
    peak_NH: Tensor  # max_j A_ij
    sink_NH: Tensor  # Σ_{j < sink_tokens} A_ij
    received_NH: Tensor  # Σ_i A_ij


def attention_cpu(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens_S: Tensor, max_length: int, scale: float
) -> Tensor:
    o_NHC = torch.empty(q_NHC.shape, dtype=q_NHC.dtype)
    for rows, size in runs(cu_seqlens_S):
        q, k, v = (
            x[rows].unflatten(0, (-1, size)).transpose(1, 2) for x in (q_NHC, k_NKC, v_NKC)
        )  # [G, H or K, T, C]
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        o_NHC[rows] = o.transpose(1, 2).flatten(0, 1)
    return o_NHC


def attention_with_statistics_cpu(
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
    o_NHC = torch.empty(q_NHC.shape, dtype=q_NHC.dtype)
    outputs = AttentionStatistics(*(torch.empty(N, H, dtype=torch.float32) for _ in range(5)))
    for rows, size in runs(cu_seqlens_S):
        q, k, v, o = (x[rows].unflatten(0, (-1, size)) for x in (q_NHC, k_NKC, v_NKC, o_NHC))
        here = AttentionStatistics(*(x[rows].unflatten(0, (-1, size)) for x in outputs))
        one_length(q, k, scale, sink_tokens, here, values=(v, o))
    # the columns cost one small product here, and the rows alone would not be faster
    return o_NHC, *outputs[:4], outputs.received_NH if columns else torch.empty(0)


def one_length(
    q_GTHC: Tensor,
    k_GJKC: Tensor,
    scale: float,
    sink_tokens: int,
    out: AttentionStatistics,
    *,
    values: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> None:
    """Measures G sequences of one length; writes to out, tensors [G, T, H] here (received [G, J, H]).

    Args:
        values: v [G, J, K, C], and o [G, T, H, C] to write what the queries read of it.
        mask: as in `attention_statistics`, with all T and J.
    """
    G, T, H, C = q_GTHC.shape
    J, K = k_GJKC.shape[1:3]
    R = H // K
    # the heads that share a key head stand in the rows of one matrix product
    # and all of it is float32: scores rounded to bfloat16 put entropies wrong in the second decimal
    q_GKRTC = (q_GTHC.float() * scale).unflatten(2, (K, R)).permute(0, 2, 3, 1, 4)
    k_GKCJ = k_GJKC.float().permute(0, 2, 3, 1).contiguous()
    v_GKJC = None if values is None else values[0].float().transpose(1, 2).contiguous()
    received_GKRJ = torch.zeros(G, K, R, J, dtype=torch.float32, device=q_GTHC.device)
    for start in range(0, T, QUERIES_PER_BLOCK):
        end = min(start + QUERIES_PER_BLOCK, T)
        B = end - start
        keys = slice(0, end if is_causal else J) if mask is None else _seen(mask[:, :, start:end])
        q_block = q_GKRTC[:, :, :, start:end].reshape(G, K, R * B, C)
        t = torch.matmul(q_block, k_GKCJ[..., keys]).view(G, K, R, B, -1)
        if is_causal:
            future = torch.ones(B, B, dtype=torch.bool, device=t.device).triu(
                1 + start - max(start, keys.start)
            )
            t[..., max(0, start - keys.start) :].masked_fill_(future, MASKED)
        if mask is not None:
            _hide(t, mask[:, :, start:end, keys])
        top = t.amax(-1, keepdim=True)
        t -= top
        p = t.exp()
        total = p.sum(-1)
        log_total = total.log()
        entropy = log_total - t.mul_(p).sum(-1) / total
        inverse = total.reciprocal()
        received_GKRJ[..., keys] += torch.matmul(inverse.unsqueeze(-2), p).squeeze(-2)
        if values is not None and v_GKJC is not None:
            o = torch.matmul(p.view(G, K, R * B, -1), v_GKJC[:, :, keys])
            o = o.view(G, K, R, B, -1) * inverse.unsqueeze(-1)
            values[1][:, start:end] = o.permute(0, 3, 1, 2, 4).flatten(2, 3)
        sink = p[..., : max(0, sink_tokens - keys.start)].sum(-1) * inverse
        for target, value in (
            (out.lse_NH, log_total.add_(top.squeeze(-1))),
            (out.entropy_NH, entropy.clamp_min_(0)),
            (out.peak_NH, inverse),
            (out.sink_NH, sink),
        ):
            target[:, start:end] = value.permute(0, 3, 1, 2).flatten(2)
    out.received_NH.copy_(received_GKRJ.permute(0, 3, 1, 2).flatten(2))


def _seen(mask: Tensor) -> slice:
    """Returns a slice from the first to the last key that any of these queries sees; others weigh 0."""
    most_J = mask.amax((0, 1, 2))
    seen = (most_J if mask.dtype == torch.bool else most_J > MASKED).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, len(most_J))


def _hide(t_GKRBJ: Tensor, mask: Tensor) -> None:
    """Applies a mask to scores in place; heads of the mask are all of them or one."""
    K, R = t_GKRBJ.shape[1:3]
    mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (K, R))
    if mask.dtype == torch.bool:
        t_GKRBJ.masked_fill_(~mask, MASKED)
    else:
        t_GKRBJ.add_(mask).clamp_min_(MASKED)


def runs(cu_seqlens_S: Tensor) -> Iterator[tuple[slice, int]]:
    """Rows and length of neighbours that have one length and run as one batch; plans order sequences by
    length, so runs are long. Empty sequences are left out.
    """
    bounds = cu_seqlens_S.tolist()
    for size, pairs in groupby(pairwise(bounds), lambda pair: pair[1] - pair[0]):
        rows = list(pairs)
        if size:
            yield slice(rows[0][0], rows[-1][1]), size
