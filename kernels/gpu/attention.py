"""Causal attention of packed sequences that also says where each query looked: flash attention, and in the
same pass the log-sum-exp, entropy, peak and sink of every row.

A program holds one block of a sequence's queries of one head and goes past the keys before them, so q, k, v
are read and o written once from memory: 2 · (2·H + 2·K) · C bytes a token in bfloat16, keys and values again
from the L2 cache for every block of queries. Statistics add 16 bytes of writing a token and head.

With t = s · scale · log₂e, m the largest t so far, δ = m_old − m and p = 2^(t − m), a tile of keys does

    weighted ← 2^δ (weighted + δ total) + Σ p (t − m)    total ← 2^δ total + Σ p

and in the end entropy = ln2 (log₂ total − weighted / total), lse = ln2 (m + log₂ total), peak = 1 / total.

t − m is the argument of the exponential anyway: the entropy costs one multiply-add a score. Both of its terms
are ≥ 0, so nothing cancels (lse − E[t] loses 1e-4 nats at large scores). Masked scores are finite: 0 · ∞ in
p (t − m) would be NaN.
"""

# pyright takes a kernel for a plain function
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .attention_columns import attention_columns
from .tiles import LOG2_E, MASKED, addresses, fetch, fetch_described, matmul, scores
from .tuned import Settings

_LN2 = tl.constexpr(0.6931471805599453)
_SINK_KEYS = tl.constexpr(16)  # sink keys of one product


@triton.jit
def _pass_keys(
    acc, top, m, total, weighted,
    q, k_tiles, v_tiles, query, begin, end, start, length, key_head, k_step, v_step, scale,
    C: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr, STATISTICS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Takes in keys begin..end of the sequence. DIAGONAL: some lie behind a query or the sequence's end."""
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        if DESCRIPTORS:
            k = fetch_described(k_tiles, start + first, key_head, KEYS, BLOCK_C)
        else:
            k = fetch(k_tiles + first * k_step, DIAGONAL, key < length, C, BLOCK_C)
        s = scores(q, k, UPCAST)
        if DIAGONAL:
            s = tl.where(key[None, :] <= query[:, None], s, MASKED)
        top = tl.maximum(top, tl.max(s, 1))
        m_new = top * scale
        x = s * scale - m_new[:, None]
        p = tl.exp2(x)
        delta = m - m_new
        a = tl.exp2(delta)
        if STATISTICS:
            weighted = a * (weighted + delta * total) + tl.sum(p * x, 1)
        total = a * total + tl.sum(p, 1)
        m = m_new
        if DESCRIPTORS:
            v = fetch_described(v_tiles, start + first, key_head, KEYS, BLOCK_C)
            if DIAGONAL:
                v = tl.where((key < length)[:, None], v, 0.0)  # a neighbour's NaN would outlive p = 0
        else:
            v = fetch(v_tiles + first * v_step, DIAGONAL, key < length, C, BLOCK_C)
        acc = matmul(p if UPCAST else p.to(v.dtype), v, UPCAST, acc * a[:, None])
    return acc, top, m, total, weighted


@triton.jit(do_not_specialize=[
    "sink_tokens", "H", "heads_per_key", "num_blocks",
    "q_row", "q_head", "k_row", "k_head", "v_row", "v_head",
])  # fmt: skip
def _kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, o_ptr, lse_ptr, entropy_ptr, peak_ptr, sink_ptr,
    cu_seqlens_ptr, scale, sink_tokens, H, heads_per_key, num_blocks,
    q_row, q_head, k_row, k_head, v_row, v_head,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr,
    STATISTICS: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, sequence = program // num_blocks % H, program // num_blocks // H
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    # a sequence's last queries see most keys and go first
    begin = (tl.cdiv(length, ROWS) - 1 - program % num_blocks) * ROWS
    if begin < 0:
        return
    key_head = head // heads_per_key
    query = begin + tl.arange(0, ROWS)
    valid = query < length
    q = fetch(addresses(q_ptr, start, query, q_row, head, q_head, BLOCK_C, UNIT), True, valid, C, BLOCK_C)

    k_step, v_step = k_row.to(tl.int64) * UNIT, v_row.to(tl.int64) * UNIT
    if DESCRIPTORS:
        k_tiles, v_tiles = k_descriptor, v_descriptor
    else:
        keys = tl.arange(0, KEYS)
        k_tiles = addresses(k_ptr, start, keys, k_row, key_head, k_head, BLOCK_C, UNIT)
        v_tiles = addresses(v_ptr, start, keys, v_row, key_head, v_head, BLOCK_C, UNIT)

    top = tl.full([ROWS], MASKED, tl.float32)
    m = top * scale
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_C], tl.float32)
    seen_by_all, end = begin // KEYS * KEYS, tl.minimum(begin + ROWS, length)
    acc, top, m, total, weighted = _pass_keys(
        acc, top, m, total, weighted,
        q, k_tiles, v_tiles, query, 0, seen_by_all, start, length, key_head, k_step, v_step, scale,
        C, KEYS, BLOCK_C, STATISTICS, DESCRIPTORS, UPCAST, DIAGONAL=False,
    )  # fmt: skip
    acc, top, m, total, weighted = _pass_keys(
        acc, top, m, total, weighted,
        q, k_tiles, v_tiles, query, seen_by_all, end, start, length, key_head, k_step, v_step, scale,
        C, KEYS, BLOCK_C, STATISTICS, DESCRIPTORS, UPCAST, DIAGONAL=True,
    )  # fmt: skip

    row = (start + query).to(tl.int64) * H + head
    column = tl.arange(0, BLOCK_C)[None, :]
    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + row[:, None] * C + column, o, mask=valid[:, None] & (column < C))
    if STATISTICS:
        sink = tl.zeros([ROWS], tl.float32)
        for first in range(0, tl.minimum(sink_tokens, length), _SINK_KEYS):
            key = first + tl.arange(0, _SINK_KEYS)
            k_first = addresses(k_ptr, start, key, k_row, key_head, k_head, BLOCK_C, UNIT)
            s = scores(q, fetch(k_first, True, key < length, C, BLOCK_C), UPCAST)
            s = tl.where((key[None, :] <= query[:, None]) & (key < sink_tokens)[None, :], s, MASKED)
            sink += tl.sum(tl.exp2(s * scale - m[:, None]), 1)
        log_total = tl.log2(total)
        tl.store(lse_ptr + row, (m + log_total) * _LN2, mask=valid)
        entropy = log_total - weighted / total
        entropy = tl.where(entropy < 0, 0.0, entropy)  # a maximum with 0 would hide NaN
        tl.store(entropy_ptr + row, entropy * _LN2, mask=valid)
        # the largest score's own term is not 1 where top · scale was rounded
        tl.store(peak_ptr + row, tl.exp2(top * scale - m) / total, mask=valid)
        tl.store(sink_ptr + row, sink / total, mask=valid)


def attention(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, cu_seqlens_S: Tensor, max_length: int, scale: float
) -> Tensor:
    """Launches the kernel of `looptap.kernels.attention.attention`."""
    o_NHC = tiles.make_empty(tuple(q_NHC.shape), q_NHC.dtype, q_NHC)
    _launch("attention", (q_NHC, k_NKC, v_NKC), o_NHC, None, cu_seqlens_S, max_length, scale, 0)
    return o_NHC


def attention_with_statistics(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    sink_tokens: int,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel that also returns lse, entropy, peak, sink and received, besides o."""
    N, H, C = q_NHC.shape
    o_NHC = tiles.make_empty((N, H, C), q_NHC.dtype, q_NHC)
    lse_NH, entropy_NH, peak_NH, sink_NH = (tiles.make_empty((N, H), torch.float32, q_NHC) for _ in range(4))
    _launch(
        "attention_with_statistics", (q_NHC, k_NKC, v_NKC), o_NHC, (lse_NH, entropy_NH, peak_NH, sink_NH),
        cu_seqlens_S, max_length, scale, sink_tokens,
    )  # fmt: skip
    if columns:
        received_NH = attention_columns(q_NHC, k_NKC, lse_NH, cu_seqlens_S, max_length, scale)
    else:
        received_NH = tiles.make_empty((0,), torch.float32, q_NHC)
    return o_NHC, lse_NH, entropy_NH, peak_NH, sink_NH, received_NH


def _launch(
    kernel: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    o_NHC: Tensor,
    statistics: tuple[Tensor, ...] | None,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
    sink_tokens: int,
) -> None:
    q_NHC, k_NKC, v_NKC = qkv
    tiles.check(*qkv, scale=scale)
    if o_NHC.numel() == 0:
        return
    settings, unit = tiles.choose_settings(kernel, *qkv), tiles.stride_unit(*qkv)
    constants = _constants(settings, q_NHC.dtype, q_NHC.shape[2], unit, statistics is not None)
    describe = tiles.make_descriptor if settings.descriptors else lambda x_NKC, rows: None
    H, K = q_NHC.shape[1], k_NKC.shape[1]
    num_blocks = triton.cdiv(max_length, settings.rows)
    _kernel[(num_blocks * H * (len(cu_seqlens_S) - 1),)](
        *qkv, describe(k_NKC, settings.keys), describe(v_NKC, settings.keys),
        o_NHC, *(statistics or (None,) * 4), cu_seqlens_S, scale * LOG2_E, sink_tokens, H, H // K, num_blocks,
        *tiles.strides(q_NHC, unit), *tiles.strides(k_NKC, unit), *tiles.strides(v_NKC, unit),
        **constants, **tiles.launch_options(settings),
    )  # fmt: skip


def _constants(
    settings: Settings, dtype: torch.dtype, width: int, unit: int, has_statistics: bool
) -> dict[str, Any]:
    return {
        "C": width,
        "BLOCK_C": tiles.block_width(width),
        "ROWS": settings.rows,
        "KEYS": settings.keys,
        "UNIT": unit,
        "STATISTICS": has_statistics,
        "DESCRIPTORS": settings.descriptors,
        "UPCAST": tiles.must_upcast(dtype),
    }
