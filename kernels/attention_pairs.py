"""Distances between the attention of several block invocations, without a T×T matrix.

There are two ways, because one does not do. Of a few recurrences of one layer, differences are taken element
by element (`attention_chain`), and so are right even where a loop has nearly converged. Of all n invocations
of a model only inner products are affordable, n² of them (`attention_gram`), and of them |A_a − A_b|² = G_aa
+ G_bb − 2 G_ab keeps few digits of a small distance (`distance_from_gram`): on a GPU, where probabilities are
rounded to float16, of one below a hundredth of the norms; on a CPU, where they are float32 and the products
float64, of one below a millionth.

On a CPU both go past the queries a block at a time, as `attention_blocks.py`; on CUDA they are kernels of
`gpu/`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .attention_blocks import QUERIES_PER_BLOCK, runs
from .library import register

# bytes of the probabilities of all invocations that exist at a time on a CPU, in two dtypes
STRIP_BYTES = 32 * 2**20


def attention_chain(
    q_RNHC: Sequence[Tensor],
    k_RNKC: Sequence[Tensor],
    lse_RNH: Sequence[Tensor],
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    pairs: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Column sums of causal attention at R invocations, and distances between pairs of them.

    Args:
        q_RNHC, k_RNKC: R tensors each, packed along N; H is a multiple of K; bfloat16, float16 or float32.
        lse_RNH: R tensors, ln Σ_j exp(score_ij) in float32, of the same queries, keys and scale.
        cu_seqlens_S: int32 [S + 1], see `make_cu_seqlens`. max_length: tokens of the longest, or more.
        scale: factor on the scores. pairs: P of them, which invocation is compared with which.
    Returns:
        Σ_i A_ij of every key, float32 [R, N, H], and ‖A_a − A_b‖_F of every pair, float32 [P, S, H]; an
        empty sequence has distance 0.
    Raises:
        ValueError: on CUDA, for fewer than 2 or more than 4 invocations.
    """
    flat = [r for pair in pairs for r in pair]
    assert all(0 <= r < len(q_RNHC) for r in flat), f"{pairs} are not places in {len(q_RNHC)} invocations"
    return _attention_chain(list(q_RNHC), list(k_RNKC), list(lse_RNH), cu_seqlens_S, max_length, scale, flat)


def attention_gram(
    q_nNHC: Tensor,
    k_nNKC: Tensor,
    lse_nNH: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    """Σ_ij A_a A_b of all pairs of n block invocations, float64 [S, H, n, n]; symmetric to the bit.

    Args: stacked along the first axis; else as for `attention_chain`. A CPU multiplies probabilities in
        float64, a GPU in float16, which is worth a relative error of 5e-4 of √(G_aa G_bb) at the most.
    """
    return _attention_gram(q_nNHC, k_nNKC, lse_nNH, cu_seqlens_S, max_length, scale)


def distance_from_gram(gram_SHnn: Tensor) -> Tensor:
    """‖A_a − A_b‖_F, mean over heads, float32 [S, n, n]; exactly 0 on the diagonal."""
    square_SHn = gram_SHnn.diagonal(dim1=-2, dim2=-1)
    distance_SHnn = square_SHn.unsqueeze(-1) + square_SHn.unsqueeze(-2) - 2 * gram_SHnn
    return distance_SHnn.clamp_min_(0).sqrt_().mean(1).float()


def _attention_chain_cpu(
    q_RNHC: list[Tensor],
    k_RNKC: list[Tensor],
    lse_RNH: list[Tensor],
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    pairs: list[int],
) -> tuple[Tensor, Tensor]:
    R, P, S, (N, H, _) = len(q_RNHC), len(pairs) // 2, len(cu_seqlens_S) - 1, q_RNHC[0].shape
    received_RNH = torch.empty(R, N, H)
    squares_PSH = torch.zeros(P, S, H, dtype=torch.float64)
    for rows, size, sequences in _numbered_runs(cu_seqlens_S):
        G = len(sequences)
        layers = [
            _by_head(*(x[rows].unflatten(0, (G, size)) for x in tensors))
            for tensors in zip(q_RNHC, k_RNKC, lse_RNH, strict=True)
        ]
        received_RGHT = torch.zeros(R, G, H, size, dtype=torch.float64)
        squares_PGH = torch.zeros(P, G, H, dtype=torch.float64)
        for start in range(0, size, QUERIES_PER_BLOCK):
            p = [_probabilities(*layer, start, scale) for layer in layers]
            for r, p_GHBJ in enumerate(p):
                received_RGHT[r, ..., : p_GHBJ.shape[-1]] += p_GHBJ.sum(-2)
            for i in range(P):
                moved_GHX = (p[pairs[2 * i]] - p[pairs[2 * i + 1]]).flatten(2)
                squares_PGH[i] += torch.linalg.vecdot(moved_GHX, moved_GHX)
        received_RNH[:, rows] = received_RGHT.transpose(2, 3).flatten(1, 2).float()
        squares_PSH[:, sequences] = squares_PGH
    return received_RNH, squares_PSH.sqrt_().float()


def _attention_gram_cpu(
    q_nNHC: Tensor,
    k_nNKC: Tensor,
    lse_nNH: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    n, _, H, _ = q_nNHC.shape
    K = k_nNKC.shape[2]
    gram_SHnn = torch.zeros(len(cu_seqlens_S) - 1, H, n, n, dtype=torch.float64)
    for rows, size, sequences in _numbered_runs(cu_seqlens_S):
        # heads that share keys stay together; as many sequences as fit, and if not one does, fewer heads
        strip_bytes = (4 + 8) * n * min(QUERIES_PER_BLOCK, size) * size * (H // K)
        most_keys = max(1, STRIP_BYTES // strip_bytes)
        G, heads = max(1, most_keys // K), min(K, most_keys)
        for first in range(0, len(sequences), G):
            some = sequences[first : first + G]
            here = slice(rows.start + first * size, rows.start + (first + len(some)) * size)
            for key in range(0, K, heads):
                of_keys = slice(key, min(key + heads, K))
                of_queries = slice(of_keys.start * (H // K), of_keys.stop * (H // K))
                gram_SHnn[some, of_queries] = _gram_of_equal_lengths(
                    q_nNHC[:, here, of_queries],
                    k_nNKC[:, here, of_keys],
                    lse_nNH[:, here, of_queries],
                    size,
                    scale,
                )
    return gram_SHnn.tril() + gram_SHnn.tril(-1).mT


def _gram_of_equal_lengths(
    q_nNHC: Tensor, k_nNKC: Tensor, lse_nNH: Tensor, size: int, scale: float
) -> Tensor:
    """Returns the inner products of G sequences of one length, float64 [G, H, n, n]."""
    n, N, H, _ = q_nNHC.shape
    layers = _by_head(*(x.unflatten(1, (-1, size)).flatten(0, 1) for x in (q_nNHC, k_nNKC, lse_nNH)))
    gram_GHnn = torch.zeros(N // size, H, n, n, dtype=torch.float64)
    for start in range(0, size, QUERIES_PER_BLOCK):
        p_XHBJ = _probabilities(*layers, start, scale)
        # in float64, since distances of a converged loop are what is left when these products cancel
        strip_GHnL = p_XHBJ.unflatten(0, (n, -1)).permute(1, 2, 0, 3, 4).flatten(3).double()
        gram_GHnn += strip_GHnL @ strip_GHnL.mT
    return gram_GHnn


def _by_head(q_GTHC: Tensor, k_GTKC: Tensor, lse_GTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q [G, H, T, C] and k [G, K, C, T] in float32, and lse [G, H, T, 1]."""
    k_GKCT = k_GTKC.float().permute(0, 2, 3, 1).contiguous()
    return q_GTHC.transpose(1, 2), k_GKCT, lse_GTH.transpose(1, 2).unsqueeze(-1)


def _probabilities(q_GHTC: Tensor, k_GKCT: Tensor, lse_GHT1: Tensor, start: int, scale: float) -> Tensor:
    """Returns the attention of the queries of the block at `start` to keys before its end, [G, H, B, end]."""
    G, H, T, C = q_GHTC.shape
    K, end = k_GKCT.shape[1], min(start + QUERIES_PER_BLOCK, T)
    # the heads that share a key head stand in the rows of one matrix product
    q_GKXC = (q_GHTC[:, :, start:end].float() * scale).reshape(G, K, -1, C)
    p_GHBJ = (q_GKXC @ k_GKCT[..., :end]).view(G, H, end - start, end)
    p_GHBJ.sub_(lse_GHT1[:, :, start:end]).exp_()
    p_GHBJ[..., start:].tril_()
    return p_GHBJ


def _numbered_runs(cu_seqlens_S: Tensor) -> Iterator[tuple[slice, int, list[int]]]:
    """Yields `runs` with the numbers of their sequences."""
    bounds = cu_seqlens_S.tolist()
    place = 0
    for rows, size in runs(cu_seqlens_S):
        while bounds[place] == bounds[place + 1]:
            place += 1
        G = (rows.stop - rows.start) // size
        yield rows, size, list(range(place, place + G))
        place += G


def _attention_chain_fake(
    q_RNHC: list[Tensor],
    k_RNKC: list[Tensor],
    lse_RNH: list[Tensor],
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    pairs: list[int],
) -> tuple[Tensor, Tensor]:
    N, H, _ = q_RNHC[0].shape
    shapes = (len(q_RNHC), N, H), (len(pairs) // 2, cu_seqlens_S.shape[0] - 1, H)
    received_RNH, distance_PSH = (q_RNHC[0].new_empty(shape, dtype=torch.float32) for shape in shapes)
    return received_RNH, distance_PSH


def _attention_gram_fake(
    q_nNHC: Tensor,
    k_nNKC: Tensor,
    lse_nNH: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    n, _, H, _ = q_nNHC.shape
    return q_nNHC.new_empty((cu_seqlens_S.shape[0] - 1, H, n, n), dtype=torch.float64)


_attention_chain = register(
    "attention_chain(Tensor[] q, Tensor[] k, Tensor[] lse, Tensor cu_seqlens, SymInt max_length, "
    "float scale, int[] pairs) -> (Tensor received, Tensor distance)",
    cpu=_attention_chain_cpu,
    fake=_attention_chain_fake,
    gpu="attention_chain",
)
_attention_gram = register(
    "attention_gram(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens, SymInt max_length, float scale) "
    "-> Tensor",
    cpu=_attention_gram_cpu,
    fake=_attention_gram_fake,
    gpu="attention_gram",
)
