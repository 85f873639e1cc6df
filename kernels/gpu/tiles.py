"""Tiles of one head, shared by the attention kernels: where they lie, how they are fetched and multiplied."""

# pyright takes a kernel for a plain function
# pyright: reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .tuned import Settings, find_settings

MASKED = tl.constexpr(-1e30)  # finite: 0 · ∞ is NaN
LOG2_E = 1.4426950408889634
LEAST_WIDTH = 64  # narrower heads take this one's tiles, whose exponentials take longer than their products
WIDTHS = range(16, 257, 8)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def addresses(
    pointer, first, offsets, row_stride, head, head_stride, BLOCK_C: tl.constexpr, UNIT: tl.constexpr
):
    """Returns the addresses of rows first + offsets of one head, [offsets, BLOCK_C]. Strides count UNIT
    elements: the compiler knows a product with 8 to be a multiple of it, and moves 16 bytes at once.
    """
    row = (first + offsets).to(tl.int64)[:, None] * (row_stride * UNIT)
    return pointer + row + head.to(tl.int64) * (head_stride * UNIT) + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def fetch(tile, MASK: tl.constexpr, mask, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads a tile from its addresses, 0 in columns behind C and, with MASK, in rows not of the mask."""
    inside = (tl.arange(0, BLOCK_C) < C)[None, :]
    if MASK:
        return tl.load(tile, mask=mask[:, None] & inside, other=0.0)
    return tl.load(tile, mask=inside, other=0.0)


@triton.jit
def fetch_described(descriptor, row, head, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads a tile through its descriptor, 0 in columns behind the head's width. Rows behind the sequence's
    end are those of the next one: the caller masks what comes of them.
    """
    return descriptor.load([row, head, 0]).reshape(ROWS, BLOCK_C)


@triton.jit
def matmul(a, b, UPCAST: tl.constexpr, acc=None):
    """Returns a @ b in their dtype; UPCAST: in float32, as the interpreter multiplies bfloat16's bits."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def scores(a, b, UPCAST: tl.constexpr):
    """Returns a @ bᵀ of tiles as wide as a head. NVIDIA GPUs have no matrix instruction for exact float32: a
    thread would hold whole rows of both, and spill. With parts of the width as a batch it holds less.
    """
    PARTS: tl.constexpr = a.shape[1] // 32
    if UPCAST or a.dtype != tl.float32:
        return matmul(a, b.T, UPCAST)
    a = a.reshape(a.shape[0], PARTS, 32).permute(1, 0, 2)
    b = b.reshape(b.shape[0], PARTS, 32).permute(1, 2, 0)
    return tl.sum(tl.dot(a, b, input_precision="ieee"), 0)


def block_width(width: int) -> int:
    """Returns the columns of a tile for heads of this width."""
    return max(LEAST_WIDTH, triton.next_power_of_2(width))


def choose_settings(kernel: str, *tensors: Tensor) -> Settings:
    """Returns the settings for heads such as these. Tensors that no descriptor can describe take those of the
    row for any target, which fetch through pointers.
    """
    x_NHC = tensors[0]
    width = block_width(x_NHC.shape[-1])
    settings = find_settings(kernel, width, x_NHC.dtype, x_NHC.device)
    if settings.descriptors and not all(_is_describable(x) for x in tensors):
        return find_settings(kernel, width, x_NHC.dtype, x_NHC.device, for_any=True)
    return settings


def make_descriptor(x_NHC: Tensor, rows: int) -> TensorDescriptor:
    """Makes the descriptor of tiles of this many rows of one head."""
    return TensorDescriptor(
        x_NHC, list(x_NHC.shape), list(x_NHC.stride()), [rows, 1, block_width(x_NHC.shape[-1])]
    )


def stride_unit(*tensors: Tensor) -> int:
    """Returns how many elements are the unit of the strides of these [N, heads, C]."""
    return 1 if any(stride % 8 for x in tensors for stride in x.stride()[:2]) else 8


def strides(x_NHC: Tensor, unit: int) -> tuple[int, int]:
    """Returns the strides from token to token and from head to head, in units."""
    return x_NHC.stride(0) // unit, x_NHC.stride(1) // unit


def make_empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Makes an unfilled tensor on the device of another; tests put guards around it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def check(q_NHC: Tensor, *keys: Tensor, scale: float) -> None:
    """Raises ValueError for what the attention kernels cannot compute."""
    H, C = q_NHC.shape[1:]
    if C not in WIDTHS:
        raise ValueError(f"heads of width {C}: attention kernels take multiples of 8 from 16 to 256")
    if not scale > 0:
        raise ValueError(f"scale {scale}: attention kernels take one above 0")
    if q_NHC.dtype not in _DTYPES:
        raise ValueError(f"{q_NHC.dtype}: attention kernels take bfloat16, float16 and float32")
    for x_NKC in keys:
        if x_NKC.shape[0] != q_NHC.shape[0] or x_NKC.shape[2] != C or H % x_NKC.shape[1]:
            raise ValueError(
                f"keys or values {tuple(x_NKC.shape)} beside queries {tuple(q_NHC.shape)}: tokens and head "
                "width must be the same, and query heads a multiple of theirs"
            )
        if x_NKC.dtype != q_NHC.dtype:
            raise ValueError(f"queries in {q_NHC.dtype}, keys or values in {x_NKC.dtype}: give one dtype")
    if any(x.stride(-1) != 1 for x in (q_NHC, *keys)):
        raise ValueError(
            "attention kernels take heads that are contiguous along their width: call .contiguous()"
        )


def must_upcast(dtype: torch.dtype) -> bool:
    """Whether products of this dtype must be taken in float32: of 16 bits in Triton's interpreter."""
    return bool(knobs.runtime.interpret) and dtype != torch.float32


def launch_options(settings: Settings) -> dict[str, Any]:
    """Returns what every launch passes besides arguments."""
    return {
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
        "enable_fp_fusion": True,  # 3.9 leaves multiply-adds apart without it
    }


def _is_describable(x_NHC: Tensor) -> bool:
    """Whether the hardware can fetch tiles of a tensor: all its boundaries are at 16 bytes."""
    size = x_NHC.element_size()
    return x_NHC.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in x_NHC.stride()[:2])
