"""Causal attention over packed sequences that also says where each query looked, without a T×T matrix.

Blocks of queries go past all their keys at once. Of each block the scores exist only until its statistics are
taken, so extra memory is linear in T. With t the scaled scores, m their row maximum and p = exp(t − m):

    l = Σp    entropy = ln l − Σ p (t − m) / l    peak = 1 / l    sink = Σ_{j<s} p / l
    received_j = Σ_i p_ij / l_i

Both terms of the entropy are ≥ 0, so nothing cancels (lse − E[t] loses 1e-4 nats at large scores).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# fewer make more calls, more compute more masked scores; least time of 32, 64, 128 and 256 at T = 512 to 2048
QUERIES_PER_BLOCK = 64
MASKED = -1e30  # finite: p · (t − m) must be 0 there, and 0 · inf is NaN


class AttentionStatistics(NamedTuple):
    """Float32 [N, H] each, of every query i (received: of every key j) of its own sequence."""

    entropy_NH: Tensor  # −Σ_j A_ij ln A_ij, nats
    peak_NH: Tensor  # max_j A_ij
    sink_NH: Tensor  # Σ_{j < sink_tokens} A_ij
    received_NH: Tensor  # Σ_i A_ij


def attention(q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Causal attention of packed sequences, [N, H, C]; nothing measured.

    Args:
        q_NHC, k_NKC, v_NKC: packed along N; H is a multiple of K. lengths: tokens of each sequence, adding up
            to N.
        scale: factor on the scores.
    """
    o_NHC = torch.empty(q_NHC.shape, dtype=q_NHC.dtype, device=q_NHC.device)
    for rows, size in _runs(lengths):
        q, k, v = (
            x[rows].unflatten(0, (-1, size)).transpose(1, 2) for x in (q_NHC, k_NKC, v_NKC)
        )  # [G, H or K, T, C]
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        o_NHC[rows] = o.transpose(1, 2).flatten(0, 1)
    return o_NHC


def attention_with_statistics(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], scale: float, sink_tokens: int = 1
) -> tuple[Tensor, AttentionStatistics]:
    """The same attention, and its statistics in float32 whatever the dtype of q, k and v.

    Args: as `attention`; sink_tokens: how many first keys of a sequence count as the sink.
    Source: arXiv 2604.11791, section 4.1 (sink, mixing and ColSum scores); the centred entropy is ours.
    """
    N, H, _ = q_NHC.shape
    o_NHC = torch.empty(q_NHC.shape, dtype=q_NHC.dtype, device=q_NHC.device)
    outputs = AttentionStatistics(
        *(torch.empty(N, H, dtype=torch.float32, device=q_NHC.device) for _ in range(4))
    )
    for rows, size in _runs(lengths):
        q, k, v, o = (x[rows].unflatten(0, (-1, size)) for x in (q_NHC, k_NKC, v_NKC, o_NHC))
        here = AttentionStatistics(*(x[rows].unflatten(0, (-1, size)) for x in outputs))
        _one_length(q, k, v, scale, sink_tokens, o, here)
    return o_NHC, outputs


def _one_length(
    q_GTHC: Tensor,
    k_GTKC: Tensor,
    v_GTKC: Tensor,
    scale: float,
    sink_tokens: int,
    o_GTHC: Tensor,
    out: AttentionStatistics,
) -> None:
    """G sequences of one length; writes into o and out, whose tensors are [G, T, H] here."""
    G, T, H, C = q_GTHC.shape
    K = k_GTKC.shape[2]
    # the heads that share a key head stand in the rows of one matrix product
    # and all of it is float32: scores rounded to bfloat16 put entropies wrong in the second decimal
    q_GKRTC = (q_GTHC.float() * scale).unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4)
    k_GKCT = k_GTKC.float().permute(0, 2, 3, 1).contiguous()
    v_GKTC = v_GTKC.float().transpose(1, 2).contiguous()
    received_GKT = torch.zeros(G, K, H // K, T, device=q_GTHC.device)
    for start in range(0, T, QUERIES_PER_BLOCK):
        end = min(start + QUERIES_PER_BLOCK, T)
        B = end - start
        q_block = q_GKRTC[:, :, :, start:end].reshape(G, K, H // K * B, C)
        t = torch.matmul(q_block, k_GKCT[..., :end]).view(G, K, H // K, B, end)
        future = torch.ones(B, B, dtype=torch.bool, device=t.device).triu(1)
        t[..., start:].masked_fill_(future, MASKED)
        t -= t.amax(-1, keepdim=True)
        p = t.exp()
        total = p.sum(-1)
        entropy = total.log() - t.mul_(p).sum(-1) / total
        inverse = total.reciprocal()
        received_GKT[..., :end] += torch.matmul(inverse.unsqueeze(-2), p).squeeze(-2)
        o = torch.matmul(p.view(G, K, -1, end), v_GKTC[:, :, :end])
        o = o.view(G, K, H // K, B, C) * inverse.unsqueeze(-1)
        o_GTHC[:, start:end] = o.permute(0, 3, 1, 2, 4).flatten(2, 3)
        sink = p[..., :sink_tokens].sum(-1) * inverse
        for target, value in (
            (out.entropy_NH, entropy.clamp_min_(0)),
            (out.peak_NH, inverse),
            (out.sink_NH, sink),
        ):
            target[:, start:end] = value.permute(0, 3, 1, 2).flatten(2)
    out.received_NH.copy_(received_GKT.permute(0, 3, 1, 2).flatten(2))


def _runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Neighbours of one length run as one batch; plans order sequences by length, so runs are long."""
    start = first = 0
    for index, size in enumerate(lengths):
        if index + 1 == len(lengths) or lengths[index + 1] != size:
            end = start + (index + 1 - first) * size
            yield slice(start, end), size
            start, first = end, index + 1
