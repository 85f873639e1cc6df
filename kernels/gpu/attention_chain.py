"""Distances of one layer's attention between recurrences, and what its keys received, in one pass.

A program holds one block of keys of R recurrences and goes past the queries from the diagonal to the
sequence's end. Of R score tiles it keeps column sums and Σ (p_a − p_b)², the differences taken element by
element: inner products would lose them to rounding where a loop has nearly converged. Bytes that must move:
2RN(H + K)C of queries and keys in 16 bit, 4RNH of lse, 4RNH of received; queries come again for every block
of keys, from the caches.
"""

# pyright takes a kernel for a plain function; Triton knows no unpacking
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: RUF005

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tuned import Settings, find_settings

MOST_RECURRENCES = 4
CHUNK = 32  # channels at a time in float32

UNIT = tl.constexpr(8)  # strides count so many elements: 16 bytes at once, and the compiler knows it
_TO_LOG2 = tl.constexpr(tiles.LOG2_E)
_MASKED = tiles.MASKED


@triton.jit
def load_rows(
    x_ptr, x_stride, start, first, length, channels, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr, NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Loads [BLOCK, BLOCK_C] from row `first` of the sequence at `start` (int64); 0 behind its end, where
    anything may stand. WHOLE: it does not end in here. NARROW: there are fewer channels than BLOCK_C.
    """
    row, channel = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_C)[None, :]
    # row · stride overflows int32 over a sequence, and does not inside a block
    x_ptrs = x_ptr + (start + first) * x_stride + (row * x_stride + channel)
    if WHOLE and NARROW:
        x = tl.load(x_ptrs, mask=channel < channels, other=0.0)
    elif WHOLE:
        x = tl.load(x_ptrs)
    elif NARROW:
        x = tl.load(x_ptrs, mask=(first + row < length) & (channel < channels), other=0.0)
    else:
        x = tl.load(x_ptrs, mask=first + row < length, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def multiply_in_chunks(
    x_ptr, x_stride, y_ptr, y_stride, start, first_x, first_y, length,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Returns x yᵀ of float32 rows, a few channels at a time: whole rows would not fit into registers."""
    NARROW: tl.constexpr = C % CHUNK != 0
    product = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
    for c in range(0, C, CHUNK):
        x = load_rows(
            x_ptr + c, x_stride, start, first_x, length, C - c, BLOCK_X, CHUNK, False, NARROW, False
        )
        y = load_rows(
            y_ptr + c, y_stride, start, first_y, length, C - c, BLOCK_Y, CHUNK, False, NARROW, False
        )
        product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
    return product


@triton.jit
def _add_queries(
    sums, squares, k, k_stride, q_ptr, q_stride, lse_ptr, start, first, first_key, length, scale_log2,
    PAIRS: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WHOLE: tl.constexpr, CHUNKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds one block of queries to the column sums of every recurrence and to the squares of every pair.

    WHOLE: all of the queries exist and see all of the keys. CHUNKED: k holds pointers instead of tiles.
    """
    row, key = tl.arange(0, ROWS), first_key + tl.arange(0, KEYS)
    p = ()
    new_sums = ()
    for r in tl.static_range(len(k)):
        if CHUNKED:
            t = multiply_in_chunks(
                k[r], k_stride[r], q_ptr[r], q_stride[r], start, first_key, first, length,
                KEYS, ROWS, C, BLOCK_C,
            )  # fmt: skip
        else:
            q = load_rows(
                q_ptr[r], q_stride[r], start, first, length, C, ROWS, BLOCK_C, WHOLE, C < BLOCK_C, UPCAST
            )
            t = tl.dot(k[r], tl.trans(q), input_precision="ieee")
        t *= scale_log2
        lse_ptrs = lse_ptr[r] + (start + first) * H + row * H  # H known: no address takes a register
        if WHOLE:
            t -= (tl.load(lse_ptrs) * _TO_LOG2)[None, :]
        else:
            here = first + row
            t -= (tl.load(lse_ptrs, mask=here < length, other=0.0) * _TO_LOG2)[None, :]
            t = tl.where((here[None, :] >= key[:, None]) & (here < length)[None, :], t, _MASKED)
        p = p + (tl.exp2(t),)
        # keys are the rows of a tile, so that its sums stay inside a warp
        new_sums = new_sums + (sums[r] + tl.sum(p[r], 1),)
        for i in tl.static_range(len(PAIRS) // 2):
            # as soon as both members are there, so that few tiles are alive at once
            if PAIRS[2 * i] == r:
                moved = p[r] - p[PAIRS[2 * i + 1]]
                squares = squares[:i] + (squares[i] + tl.sum(moved * moved, 1),) + squares[i + 1 :]
    return new_sums, squares


@triton.jit(do_not_specialize=[
    *(f"{x}{r}_{axis}" for r in range(4) for x, axis in (("q", "N"), ("q", "H"), ("k", "N"), ("k", "K"))),
    "N", "num_sequences", "num_blocks", "heads_per_key",
])  # fmt: skip
def _kernel(
    q0_ptr, k0_ptr, lse0_ptr, q0_N, q0_H, k0_N, k0_K,  # strides in UNITs, by token and head
    q1_ptr, k1_ptr, lse1_ptr, q1_N, q1_H, k1_N, k1_K,
    q2_ptr, k2_ptr, lse2_ptr, q2_N, q2_H, k2_N, k2_K,
    q3_ptr, k3_ptr, lse3_ptr, q3_N, q3_H, k3_N, k3_K,
    cu_seqlens_ptr, received_ptr, partials_ptr, N, num_sequences, num_blocks, heads_per_key, scale_log2,
    R: tl.constexpr,
    PAIRS: tl.constexpr,  # flat, of each pair the later member first
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # the first keys have the most queries after them and go first
    sequence, block = tl.program_id(0) % num_sequences, tl.program_id(0) // num_sequences
    h = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    first = block * KEYS

    q_ptr, k_ptr = (q0_ptr, q1_ptr, q2_ptr, q3_ptr), (k0_ptr, k1_ptr, k2_ptr, k3_ptr)
    lse_ptr = (lse0_ptr, lse1_ptr, lse2_ptr, lse3_ptr)
    q_N, q_H = (q0_N, q1_N, q2_N, q3_N), (q0_H, q1_H, q2_H, q3_H)
    k_N, k_K = (k0_N, k1_N, k2_N, k3_N), (k0_K, k1_K, k2_K, k3_K)
    q, q_stride = (), ()
    k, k_stride = (), ()
    lse = ()
    sums, squares = (), ()
    for r in tl.static_range(R):
        q = q + (q_ptr[r] + h * (q_H[r] * UNIT),)
        q_stride = q_stride + (q_N[r] * UNIT,)
        keys = k_ptr[r] + h // heads_per_key * (k_K[r] * UNIT)
        k_stride = k_stride + (k_N[r] * UNIT,)
        if not CHUNKED:
            keys = load_rows(
                keys, k_stride[r], start, first, length, C, KEYS, BLOCK_C, False, C < BLOCK_C, UPCAST
            )
        k = k + (keys,)
        lse = lse + (lse_ptr[r] + h,)
        sums = sums + (tl.zeros([KEYS], tl.float32),)
    for _ in tl.static_range(len(PAIRS) // 2):
        squares = squares + (tl.zeros([KEYS], tl.float32),)

    # only queries on the diagonal, and a last block that is not whole, need masks
    DIAGONAL: tl.constexpr = (ROWS if ROWS > KEYS else KEYS) // ROWS  # blocks of queries
    ahead = tl.maximum(length - first, 0)  # none where the sequence has ended
    num_query_blocks, num_whole = tl.cdiv(ahead, ROWS), tl.maximum(ahead // ROWS, DIAGONAL)
    for i in range(tl.minimum(num_query_blocks, DIAGONAL) + tl.maximum(num_query_blocks - num_whole, 0)):
        row = first + tl.where(i < DIAGONAL, i, num_whole) * ROWS
        sums, squares = _add_queries(
            sums, squares, k, k_stride, q, q_stride, lse, start, row, first, length, scale_log2,
            PAIRS, H, C, BLOCK_C, ROWS, KEYS, False, CHUNKED, UPCAST,
        )  # fmt: skip
    for i in range(DIAGONAL, num_whole):
        sums, squares = _add_queries(
            sums, squares, k, k_stride, q, q_stride, lse, start, first + i * ROWS, first, length, scale_log2,
            PAIRS, H, C, BLOCK_C, ROWS, KEYS, True, CHUNKED, UPCAST,
        )  # fmt: skip

    key = first + tl.arange(0, KEYS)
    for r in tl.static_range(R):
        received = received_ptr + (r * N.to(tl.int64) + start + first) * H + h
        tl.store(received + tl.arange(0, KEYS) * H, sums[r], mask=key < length)
    slot = (sequence * H + h) * num_blocks + block
    for i in tl.static_range(len(PAIRS) // 2):
        # a program without queries leaves 0
        size = num_sequences.to(tl.int64) * H * num_blocks
        tl.store(partials_ptr + i * size + slot, tl.sum(squares[i], 0))


def attention_chain(
    q_RNHC: Sequence[Tensor],
    k_RNKC: Sequence[Tensor],
    lse_RNH: Sequence[Tensor],
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    pairs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Launches the kernel of `attention_chain` in `kernels/attention_pairs.py`.

    Raises:
        ValueError: fewer than 2 or more than 4 recurrences, or heads that the attention kernels do not take.
    """
    R, q = len(q_RNHC), q_RNHC[0]
    if not 2 <= R <= MOST_RECURRENCES:
        raise ValueError(
            f"{R} recurrences: attention_chain holds 2 to {MOST_RECURRENCES} at once on a GPU; "
            "give it that many neighbours at a time"
        )
    for q_NHC, k_NKC in zip(q_RNHC, k_RNKC, strict=True):
        tiles.check(q_NHC, k_NKC, scale=scale)
    (N, H, C), S, P = q.shape, len(cu_seqlens_S) - 1, len(pairs) // 2
    settings = find_settings(f"attention_chain_{R}", table_width(C, q.dtype), q.dtype, q.device)
    num_blocks = triton.cdiv(max_length, settings.keys)
    received_RNH = tiles.make_empty((R, N, H), torch.float32, q)
    partials_PSHB = tiles.make_empty((P, S, H, num_blocks), torch.float32, q)
    arguments = []
    for q_NHC, k_NKC, lse_NH in zip(map(aligned, q_RNHC), map(aligned, k_RNKC), lse_RNH, strict=True):
        strides = (*q_NHC.stride()[:2], *k_NKC.stride()[:2])
        arguments += [q_NHC, k_NKC, lse_NH.contiguous(), *(stride // 8 for stride in strides)]
    if S and num_blocks:
        _kernel[(S * num_blocks, H)](
            *arguments, *[None] * (7 * (MOST_RECURRENCES - R)),
            cu_seqlens_S, received_RNH, partials_PSHB, N, S, num_blocks, H // k_RNKC[0].shape[1],
            scale * tiles.LOG2_E,
            **_constants(settings, R, pairs, H, C, q.dtype),
            **tiles.launch_options(settings),
        )  # fmt: skip
    return received_RNH, partials_PSHB.sum(-1, dtype=torch.float64).sqrt_().float()


def aligned(x: Tensor) -> Tensor:
    """Returns x, or a copy if its rows begin at no boundary of 16 bytes: loads by element would spill."""
    if x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def table_width(C: int, dtype: torch.dtype) -> int:
    """Returns the width that settings are kept under; in float32 the size of a tile does not depend on it."""
    return tiles.LEAST_WIDTH if dtype == torch.float32 else tiles.block_width(C)


def tile_constants(C: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns how the channels of a tile are cut."""
    in_chunks = dtype == torch.float32
    return {
        "C": C,
        "BLOCK_C": CHUNK if in_chunks else tiles.block_width(C),
        "CHUNKED": in_chunks,
        "UPCAST": tiles.must_upcast(dtype),
    }


def _constants(
    settings: Settings, R: int, pairs: Sequence[int], H: int, C: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "R": R,
        "PAIRS": tuple(f(pairs[i : i + 2]) for i in range(0, len(pairs), 2) for f in (max, min)),
        "H": H,
        "ROWS": settings.rows,
        "KEYS": settings.keys,
        **tile_constants(C, dtype),
    }
