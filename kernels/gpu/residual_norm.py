"""The residual add with its norms and the statistics of what it leaves, in one pass.

A program holds whole rows in registers, so every byte moves once. Of a row of D elements: x and branch in,
residual out; y out where a norm follows; block_input, previous and last in, each where given; 28 bytes of
statistics. In bfloat16 that is 6D bytes without a following norm, 8D with one, 10D with `previous`.
Weights are read once a program and stay in the caches.

Every rounding stands where PyTorch's CPU code has one (`kernels/residual_norm.py`), so a capture on a GPU and
one on a CPU differ by the order of sums alone. Statistics are those of the rounded residual.
"""

# pyright takes a kernel for a plain function and its None arguments for values
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..residual_norm import STATISTICS
from .tuned import Settings, find_settings

LEAST_WIDTH = 512  # narrower rows are padded to it, which costs lanes and no bytes

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _read(pointer, rows, stride, columns, mask):
    return tl.load(pointer + rows * stride + columns, mask=mask, other=0.0)


@triton.jit
def _normed(x, squares, weight_ptr, columns, D, eps, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """Returns weight · x / √(squares / D + eps) in float32, rounded to DTYPE before weighting."""
    mask = columns < D if MASKED else None
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0 if MASKED else None)
    scale = tl.rsqrt(squares / D + eps)
    return (x * scale[:, None]).to(DTYPE).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _norm_of_difference(x, y):
    difference = x - y
    return tl.sqrt_rn(tl.sum(difference * difference, 1))


@triton.jit
def cosine(products, difference, norm, reference_norm):
    """Returns the cosine of two rows, from Σxy and ‖x − y‖ with their norms; `kernels/residual_norm.py` has
    the formula.

    Two lengths that differ much leave no digits of it, and there the products keep theirs.
    """
    length_gap = norm - reference_norm
    # a product of two lengths would overflow where they do not
    below, above = (difference - length_gap) / (2 * norm), (difference + length_gap) / reference_norm
    return tl.where(difference < 0.5 * norm, 1 - below * above, products / norm / reference_norm)


@triton.jit
def _distance(x, norm, reference):
    difference = _norm_of_difference(x, reference)
    reference_norm = tl.sqrt_rn(tl.sum(reference * reference, 1))
    return difference, cosine(tl.sum(x * reference, 1), difference, norm, reference_norm)


# BRANCH_DTYPE is the branch's once normed, SUM_DTYPE that of x + branch; MASKED: BLOCK_D is larger than D
@triton.jit(do_not_specialize=["N"])
def _kernel(
    x_ptr, branch_ptr, branch_weight_ptr, stream_weight_ptr, next_weight_ptr,
    block_input_ptr, previous_ptr, last_ptr,
    residual_ptr, y_ptr, statistics_ptr,
    N, D, eps,
    x_stride, branch_stride, block_input_stride, previous_stride, last_stride, residual_stride,
    BRANCH_DTYPE: tl.constexpr, SUM_DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row · stride overflows int32
    rows, columns = row[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = rows < N
    if MASKED:
        mask = mask & (columns < D)

    # every row is asked for before any is waited for
    x = _read(x_ptr, rows, x_stride, columns, mask)
    branch = _read(branch_ptr, rows, branch_stride, columns, mask)
    if block_input_ptr is not None:
        block_input = _read(block_input_ptr, rows, block_input_stride, columns, mask)
    if previous_ptr is not None:
        previous = _read(previous_ptr, rows, previous_stride, columns, mask)
    if last_ptr is not None:
        last = _read(last_ptr, rows, last_stride, columns, mask)

    branch = branch.to(tl.float32)
    if branch_weight_ptr is not None:
        squares = tl.sum(branch * branch, 1)
        branch = _normed(
            branch, squares, branch_weight_ptr, columns, D, eps, MASKED, branch_ptr.dtype.element_ty
        )
        branch = branch.to(BRANCH_DTYPE).to(tl.float32)
    total = (x.to(tl.float32) + branch).to(SUM_DTYPE).to(tl.float32)
    if stream_weight_ptr is not None:
        squares = tl.sum(total * total, 1)
        total = _normed(total, squares, stream_weight_ptr, columns, D, eps, MASKED, SUM_DTYPE)

    RESIDUAL_DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    rounded = total.to(RESIDUAL_DTYPE)
    tl.store(residual_ptr + rows * residual_stride + columns, rounded, mask=mask)
    residual = rounded.to(tl.float32)

    squares = tl.sum(residual * residual, 1)
    if statistics_ptr is not None:
        norm = tl.sqrt_rn(squares)
        peak = tl.max(tl.abs(residual), 1)
        peak = tl.where(norm == norm, peak, norm)  # a maximum passes over NaN, and a sum does not
        update_norm = tl.full([ROWS], float("nan"), tl.float32)
        step_norm, step_cosine, gap_norm, gap_cosine = update_norm, update_norm, update_norm, update_norm
        if block_input_ptr is not None:
            update_norm = _norm_of_difference(residual, block_input.to(tl.float32))
        if previous_ptr is not None:
            step_norm, step_cosine = _distance(residual, norm, previous.to(tl.float32))
        if last_ptr is not None:
            gap_norm, gap_cosine = _distance(residual, norm, last.to(tl.float32))
        there = row < N
        size = N.to(tl.int64)
        # in the order of STATISTICS
        values = (norm, peak, update_norm, step_norm, step_cosine, gap_norm, gap_cosine)
        for s in tl.static_range(len(values)):
            tl.store(statistics_ptr + s * size + row, values[s], mask=there)

    if next_weight_ptr is not None:
        y = _normed(residual, squares, next_weight_ptr, columns, D, eps, MASKED, RESIDUAL_DTYPE)
        tl.store(y_ptr + rows * D + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


class Weights(NamedTuple):
    """Weights of the norms on the branch, on the sum and before the next branch, [D] each."""

    branch_D: Tensor | None
    stream_D: Tensor | None
    next_D: Tensor | None


def residual_norm(
    x_ND: Tensor,
    branch_ND: Tensor,
    branch_weight_D: Tensor | None,
    stream_weight_D: Tensor | None,
    next_weight_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the residual, and y: the residual normed with next_weight, or an empty tensor without that.

    Args:
        x_ND, branch_ND: contiguous in D, rows at any distance; D up to the table's largest width.
        branch_weight_D, stream_weight_D, next_weight_D: norms on the branch, on the sum and before the next
            branch, each where given.
        eps: added to the mean square in every norm.
    Raises:
        ValueError: shapes differ, D is not contiguous, or the table has no settings for this width.
    """
    return _launch(x_ND, branch_ND, Weights(branch_weight_D, stream_weight_D, next_weight_D), eps)


def residual_norm_statistics(
    x_ND: Tensor,
    branch_ND: Tensor,
    branch_weight_D: Tensor | None,
    stream_weight_D: Tensor | None,
    next_weight_D: Tensor | None,
    eps: float,
    block_input_ND: Tensor | None,
    previous_ND: Tensor | None,
    last_ND: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `residual_norm` does, and statistics of the residual, float32 [7, N]: norm, peak (largest
    |x|), update_norm (distance to block_input), step_norm and step_cosine (to previous), gap_norm and
    gap_cosine (to last). Rows whose reference is not given are NaN, and so are cosines of a row of zeros.
    """
    weights = Weights(branch_weight_D, stream_weight_D, next_weight_D)
    statistics = _empty((len(STATISTICS), len(x_ND)), torch.float32, x_ND.device)
    references = (block_input_ND, previous_ND, last_ND)
    return *_launch(x_ND, branch_ND, weights, eps, references, statistics), statistics


def _launch(
    x_ND: Tensor,
    branch_ND: Tensor,
    weights: Weights,
    eps: float,
    references: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; returns the residual and y."""
    N, D = x_ND.shape
    # a norm's result has the wider of two types, since PyTorch multiplies with the weight after rounding
    branch_dtype = _wider(branch_ND.dtype, weights.branch_D)
    sum_dtype = torch.promote_types(x_ND.dtype, branch_dtype)
    dtype = _wider(sum_dtype, weights.stream_D)
    residual_ND = _empty((N, D), dtype, x_ND.device)
    y_ND = _empty((0,) if weights.next_D is None else (N, D), _wider(dtype, weights.next_D), x_ND.device)
    tensors_ND = (x_ND, branch_ND, *references, residual_ND)
    _check(tensors_ND, weights)
    settings = find_settings("residual_norm", max(D, LEAST_WIDTH), dtype, x_ND.device)
    _kernel[(triton.cdiv(N, settings.rows),)](
        *(x_ND, branch_ND, *weights, *references, residual_ND),
        *(None if weights.next_D is None else y_ND, statistics),
        *(N, D, eps, *(0 if tensor is None else tensor.stride(0) for tensor in tensors_ND)),
        BRANCH_DTYPE=_TYPES[branch_dtype],
        SUM_DTYPE=_TYPES[sum_dtype],
        **tile_constants(settings, D),
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        enable_fp_fusion=True,
    )
    return residual_ND, y_ND


def _empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _wider(dtype: torch.dtype, weight_D: Tensor | None) -> torch.dtype:
    return dtype if weight_D is None else torch.promote_types(dtype, weight_D.dtype)


def _check(tensors_ND: tuple[Tensor | None, ...], weights: Weights) -> None:
    """Refuses tensors that would be read or written outside of their memory; x is the first."""
    x_ND = tensors_ND[0]
    assert x_ND is not None
    N, D = x_ND.shape
    names = ("x", "branch", "block_input", "previous", "last", "residual")
    for name, tensor in zip(names, tensors_ND, strict=True):
        if tensor is not None and (tensor.shape != x_ND.shape or (D > 1 and tensor.stride(1) != 1)):
            size, strides = tuple(tensor.shape), tensor.stride()
            raise ValueError(f"{name} is {size} with strides {strides}, not rows of {D} as x, {N} of them")
    for name, weight_D in zip(("branch_weight", "stream_weight", "next_weight"), weights, strict=True):
        if weight_D is not None and (weight_D.shape != (D,) or not weight_D.is_contiguous()):
            raise ValueError(f"{name} is {tuple(weight_D.shape)}, not contiguous ({D},) as rows of x")


def tile_constants(settings: Settings, D: int) -> dict[str, Any]:
    """Returns how whole rows are cut into tiles, by the names of the kernels' constants."""
    block_D = max(triton.next_power_of_2(D), LEAST_WIDTH)
    return {"ROWS": settings.rows, "BLOCK_D": block_D, "MASKED": block_D > D}
