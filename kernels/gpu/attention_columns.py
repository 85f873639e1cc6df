"""Column sums of causal attention, what every key receives, from queries, keys and rows' log-sum-exp.

A program holds one block of a sequence's keys for one query head and goes past the queries from there on, so
k, q and lse are read once from memory, (H + K) · C elements and 4·H bytes a token, q again from the L2 cache
for every block of keys; 4·H bytes a token are written. Scores are taken with keys as rows: a column sum is
then a sum along a row of the tile, within a warp. No sum goes through memory, so results repeat bit for bit.
"""

# pyright takes a kernel for a plain function and its None arguments for values
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import LOG2_E, MASKED, addresses, fetch, fetch_described, scores
from .tuned import Settings

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _add_queries(
    received, k, q_tiles, lse_ptr, key, first, start, length, head, q_step, scale,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds one tile of queries. EDGE: some do not see every key, or lie behind the sequence's end."""
    query = first + tl.arange(0, ROWS)
    if DESCRIPTORS:
        q = fetch_described(q_tiles, start + first, head, ROWS, BLOCK_C)
    else:
        q = fetch(q_tiles + first * q_step, EDGE, query < length, C, BLOCK_C)
    # a scalar and constants, for H is one: computed row by row they would cost as much as the exponentials
    lse_rows = lse_ptr + (start + first).to(tl.int64) * H + head + tl.arange(0, ROWS) * H
    lse = tl.load(lse_rows, mask=query < length, other=0.0) if EDGE else tl.load(lse_rows)
    x = scores(k, q, UPCAST) * scale - (lse * _LOG2_E)[None, :]
    if EDGE:
        seen = (key[:, None] <= query[None, :]) & (query < length)[None, :]
        x = tl.where(seen, x, MASKED)
    return received + tl.sum(tl.exp2(x), 1)


@triton.jit(do_not_specialize=["heads_per_key", "num_blocks", "q_row", "q_head", "k_row", "k_head"])
def _kernel(
    q_ptr, k_ptr, q_descriptor, lse_ptr, received_ptr,
    cu_seqlens_ptr, scale, heads_per_key, num_blocks,
    q_row, q_head, k_row, k_head,
    H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    UNIT: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, sequence = program // num_blocks % H, program // num_blocks // H
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    begin = program % num_blocks * KEYS
    if begin >= length:
        return
    key = begin + tl.arange(0, KEYS)
    k_tile = addresses(k_ptr, start, key, k_row, head // heads_per_key, k_head, BLOCK_C, UNIT)
    k = fetch(k_tile, True, key < length, C, BLOCK_C)
    q_step = q_row.to(tl.int64) * UNIT
    if DESCRIPTORS:
        q_tiles = q_descriptor
    else:
        q_tiles = addresses(q_ptr, start, tl.arange(0, ROWS), q_row, head, q_head, BLOCK_C, UNIT)

    # tiles of queries: those on the diagonal, those that see every key, and an unfinished one at the end
    first_tile = begin // ROWS
    full_tile = tl.minimum(tl.cdiv(begin + KEYS, ROWS), length // ROWS)
    full_tile = tl.maximum(full_tile, first_tile)
    last_tile = length // ROWS
    received = tl.zeros([KEYS], tl.float32)
    for tile in range(full_tile, last_tile):
        received = _add_queries(
            received, k, q_tiles, lse_ptr, key, tile * ROWS, start, length, head, q_step, scale,
            H, C, ROWS, BLOCK_C, DESCRIPTORS, UPCAST, EDGE=False,
        )  # fmt: skip
    num_edges = full_tile - first_tile + (last_tile * ROWS < length).to(tl.int32)
    for edge in range(0, num_edges):
        tile = tl.where(first_tile + edge < full_tile, first_tile + edge, last_tile)
        received = _add_queries(
            received, k, q_tiles, lse_ptr, key, tile * ROWS, start, length, head, q_step, scale,
            H, C, ROWS, BLOCK_C, DESCRIPTORS, UPCAST, EDGE=True,
        )  # fmt: skip
    tl.store(received_ptr + (start + key).to(tl.int64) * H + head, received, mask=key < length)


def attention_columns(
    q_NHC: Tensor, k_NKC: Tensor, lse_NH: Tensor, cu_seqlens_S: Tensor, max_length: int, scale: float
) -> Tensor:
    """Σ_i A_ij of every key, float32 [N, H]; `attention_with_statistics` calls it where columns are wanted.

    Args:
        q_NHC, k_NKC, cu_seqlens_S, max_length, scale: as for `kernels/attention.py`.
        lse_NH: ln Σ_j exp(score_ij) in float32, of the same queries, keys and scale.
    Raises:
        ValueError: heads that the attention kernels do not take.
    """
    tiles.check(q_NHC, k_NKC, scale=scale)
    N, H, C = q_NHC.shape
    received_NH = tiles.make_empty((N, H), torch.float32, q_NHC)
    if N == 0:
        return received_NH
    settings = tiles.choose_settings("attention_columns", q_NHC, k_NKC)
    unit = tiles.stride_unit(q_NHC, k_NKC)
    num_blocks = triton.cdiv(max_length, settings.keys)
    _kernel[(num_blocks * H * (len(cu_seqlens_S) - 1),)](
        q_NHC, k_NKC, tiles.make_descriptor(q_NHC, settings.rows) if settings.descriptors else None,
        lse_NH.contiguous(), received_NH, cu_seqlens_S, scale * LOG2_E, H // k_NKC.shape[1], num_blocks,
        *tiles.strides(q_NHC, unit), *tiles.strides(k_NKC, unit),
        **_constants(settings, q_NHC.dtype, H, C, unit), **tiles.launch_options(settings),
    )  # fmt: skip
    return received_NH


def _constants(settings: Settings, dtype: torch.dtype, heads: int, width: int, unit: int) -> dict[str, Any]:
    return {
        "H": heads,
        "C": width,
        "BLOCK_C": tiles.block_width(width),
        "ROWS": settings.rows,
        "KEYS": settings.keys,
        "UNIT": unit,
        "DESCRIPTORS": settings.descriptors,
        "UPCAST": tiles.must_upcast(dtype),
    }
