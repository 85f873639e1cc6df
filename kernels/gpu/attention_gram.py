"""Inner products of the attention of all pairs of n block invocations, through a bounded workspace.

Attention is cut into square tiles of queries × keys, on and below the diagonal. One kernel writes a tile's
probabilities of all invocations, [n, tile], in float16; another multiplies them by their transpose, in
pieces whose float32 products are summed in float64. Both run on as many tiles at a time as the workspace
holds: memory grows with neither N nor T, and what the second reads is still in the second-level cache.
Probabilities are stored times 2¹⁵, since those below 6e-5 would lose digits in float16. Bytes for one
sequence and head: nT² written and read, once more for every further 128 invocations; queries and keys
2nT²C / edge.
"""

# pyright takes a kernel for a plain function
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .attention_chain import UNIT, aligned, load_rows, multiply_in_chunks, table_width, tile_constants
from .tuned import Settings, find_settings

TILES_BYTES = 32 * 2**20
PRODUCTS_BYTES = 16 * 2**20
PROGRAMS = 512  # for a product, if its tiles can be shared out so far: some for every unit of a large GPU
LEAST_BLOCK, LARGEST_BLOCK = 32, 128  # invocations of one product; fewer are padded, more are cut

_TO_LOG2 = tl.constexpr(tiles.LOG2_E)
_MASKED = tiles.MASKED
_SHIFT = tl.constexpr(15)  # log2 of the factor on stored probabilities: 2¹⁵ is float16's largest power of two


@triton.jit
def _place(index):
    """Returns row and column of an index that counts a lower triangle, its diagonal included, row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the root may be rounded across an integer
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit(do_not_specialize=[
    "q_n", "q_N", "q_H", "k_n", "k_N", "k_K", "lse_n", "lse_N", "n", "H", "heads_per_key",
    "first_map", "first_tile", "num_tiles",
])  # fmt: skip
def _tile_kernel(
    q_ptr, k_ptr, lse_ptr, cu_seqlens_ptr, tiles_ptr,
    q_n, q_N, q_H, k_n, k_N, k_K,  # strides in UNITs, by invocation, token and head
    lse_n, lse_N, n, H, heads_per_key, first_map, first_tile, num_tiles, scale_log2,
    EDGE: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    slot, invocation = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    attention_map = first_map + tl.program_id(0) // num_tiles  # of one sequence and head
    sequence, h = attention_map // H, (attention_map % H).to(tl.int64)
    row_block, key_block = _place(first_tile + tl.program_id(0) % num_tiles)
    first_row, first_key = row_block * EDGE, key_block * EDGE
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    if first_row < length:  # else nothing reads the tile
        q_ptr += invocation * (q_n * UNIT) + h * (q_H * UNIT)
        k_ptr += invocation * (k_n * UNIT) + h // heads_per_key * (k_K * UNIT)
        q_N *= UNIT
        k_N *= UNIT
        if CHUNKED:
            t = multiply_in_chunks(
                q_ptr, q_N, k_ptr, k_N, start, first_row, first_key, length, EDGE, EDGE, C, BLOCK_C
            )
        else:
            NARROW: tl.constexpr = C < BLOCK_C
            q = load_rows(q_ptr, q_N, start, first_row, length, C, EDGE, BLOCK_C, False, NARROW, UPCAST)
            k = load_rows(k_ptr, k_N, start, first_key, length, C, EDGE, BLOCK_C, False, NARROW, UPCAST)
            t = tl.dot(q, tl.trans(k), input_precision="ieee")
        row, key = first_row + tl.arange(0, EDGE), first_key + tl.arange(0, EDGE)
        lse_ptrs = lse_ptr + invocation * lse_n + (start + row) * lse_N + h
        lse = tl.load(lse_ptrs, mask=row < length, other=0.0) * _TO_LOG2 - _SHIFT
        t = t * scale_log2 - lse[:, None]
        t = tl.where((row[:, None] >= key[None, :]) & (row < length)[:, None], t, _MASKED)
        at = tl.arange(0, EDGE)[:, None] * EDGE + tl.arange(0, EDGE)[None, :]
        tl.store(tiles_ptr + (slot * n + invocation) * (EDGE * EDGE) + at, tl.exp2(t).to(tl.float16))


@triton.jit(do_not_specialize=["n", "H", "first_map", "first_tile", "num_tiles", "num_splits"])
def _product_kernel(
    tiles_ptr, products_ptr, cu_seqlens_ptr, n, H, first_map, first_tile, num_tiles, num_splits,
    EDGE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SQUARE: tl.constexpr,  # one block holds all invocations
    UPCAST: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = EDGE * EDGE
    place, split = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    row_block, column_block = _place(tl.program_id(1))
    sequence = (first_map + place) // H
    length = tl.load(cu_seqlens_ptr + sequence + 1) - tl.load(cu_seqlens_ptr + sequence)
    # tiles stand in the order of their rows: those behind the sequence's end, never written, come last
    num_rows = tl.cdiv(length, EDGE)
    num_filled = tl.minimum(num_rows * (num_rows + 1) // 2 - first_tile, num_tiles)
    steps = SIZE // CHUNK // num_splits  # of a tile
    a, b = row_block * BLOCK + tl.arange(0, BLOCK), column_block * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, CHUNK)[None, :]
    base = tiles_ptr + (place * num_tiles).to(tl.int64) * n * SIZE
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(num_filled * steps):
        here = base + (i // steps * n * SIZE + (split * steps + i % steps) * CHUNK)
        x = tl.load(here + (a[:, None] * SIZE + at), mask=(a < n)[:, None], other=0.0)
        y = x
        if not SQUARE:
            y = tl.load(here + (b[:, None] * SIZE + at), mask=(b < n)[:, None], other=0.0)
        gram = tiles.matmul(x, tl.trans(y), UPCAST, gram)
    # whole blocks, whose addresses the compiler knows: with masks they took registers until it spilled
    slot = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(products_ptr + slot * (BLOCK * BLOCK) + at, gram)


def attention_gram(
    q_nNHC: Tensor,
    k_nNKC: Tensor,
    lse_nNH: Tensor,
    cu_seqlens_S: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    """Launches the kernels of `attention_gram` in `kernels/attention_pairs.py`.

    Raises:
        ValueError: heads that the attention kernels do not take.
    """
    tiles.check(q_nNHC[0], k_nNKC[0], scale=scale)
    q_nNHC, k_nNKC = aligned(q_nNHC), aligned(k_nNKC)
    (n, _, H, C), K, S = q_nNHC.shape, k_nNKC.shape[2], len(cu_seqlens_S) - 1
    like, dtype, device = q_nNHC, q_nNHC.dtype, q_nNHC.device
    by_tile = find_settings("attention_gram", table_width(C, dtype), dtype, device)
    width = min(max(n, LEAST_BLOCK), LARGEST_BLOCK)
    by_product = find_settings("attention_gram_product", width, torch.float16, device)
    edge, block = by_tile.rows, by_product.rows
    num_row_blocks, side = triton.cdiv(max_length, edge), triton.cdiv(n, block)
    places = [(row, column) for row in range(side) for column in range(row + 1)]  # of blocks in the result
    num_maps, num_tiles = S * H, num_row_blocks * (num_row_blocks + 1) // 2
    maps, tiles_at_once, splits = _cut(n, num_maps, num_tiles, edge, len(places), by_product)
    tiles_XnL = tiles.make_empty((maps * tiles_at_once, n, edge * edge), torch.float16, like)
    products = tiles.make_empty((maps, splits, len(places), block, block), torch.float32, like)
    gram_Mnn = tiles.make_empty((num_maps, n, n), torch.float64, like)
    strides = [stride // 8 for stride in (*q_nNHC.stride()[:3], *k_nNKC.stride()[:3])]
    for first_map in range(0, num_maps, maps):
        M = min(maps, num_maps - first_map)
        blocks = torch.zeros(M, *products.shape[2:], dtype=torch.float64, device=device)
        for first_tile in range(0, num_tiles, tiles_at_once):
            here = (first_map, first_tile, min(tiles_at_once, num_tiles - first_tile))
            _tile_kernel[(M * here[2], n)](
                q_nNHC, k_nNKC, lse_nNH, cu_seqlens_S, tiles_XnL, *strides,
                *lse_nNH.stride()[:2], n, H, H // K, *here, scale * tiles.LOG2_E,
                **_tile_constants(by_tile, C, dtype), **tiles.launch_options(by_tile),
            )  # fmt: skip
            _product_kernel[(M * splits, len(places))](
                tiles_XnL, products, cu_seqlens_S, n, H, *here, splits,
                **_product_constants(by_product, edge, side == 1), **tiles.launch_options(by_product),
            )  # fmt: skip
            blocks += products[:M].sum(1, dtype=torch.float64)
        for index, (row, column) in enumerate(places):
            target = gram_Mnn[first_map : first_map + M, row * block :, column * block :][:, :block, :block]
            target.copy_(blocks[:, index, : target.shape[1], : target.shape[2]])
    gram_Mnn.tril_().mul_(4.0 ** -int(_SHIFT))  # blocks above the diagonal are not computed
    return (gram_Mnn + gram_Mnn.tril(-1).mT).view(S, H, n, n)


def _cut(
    n: int, num_maps: int, num_tiles: int, edge: int, num_blocks: int, by_product: Settings
) -> tuple[int, int, int]:
    """Returns the numbers of maps at once, of tiles of each, and of programs that a product is split into
    along a tile; of shapes alone, and within TILES_BYTES and PRODUCTS_BYTES unless a single one is larger.
    """
    slots = max(1, TILES_BYTES // (2 * n * edge * edge))
    most_products = max(1, PRODUCTS_BYTES // (4 * num_blocks * by_product.rows**2))
    tiles_at_once = max(1, min(num_tiles, slots))
    maps = max(1, min(num_maps, slots // tiles_at_once, most_products))
    most_splits = edge * edge // by_product.keys
    splits = max(1, min(most_splits, PROGRAMS // (maps * num_blocks), most_products // maps))
    return maps, tiles_at_once, 1 << (splits.bit_length() - 1)


def _tile_constants(settings: Settings, C: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"EDGE": settings.rows, **tile_constants(C, dtype)}


def _product_constants(settings: Settings, edge: int, square: bool) -> dict[str, Any]:
    return {
        "EDGE": edge,
        "BLOCK": settings.rows,
        "CHUNK": settings.keys,
        "SQUARE": square,
        "UPCAST": tiles.must_upcast(torch.float16),
    }
