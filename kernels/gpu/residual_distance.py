"""Distance of each row from its reference, in one pass: of bfloat16 4D bytes in, and 16 of norms and results.

It is for states that wait for the last recurrence; where the reference is there already, the residual add
measures the same on its way (`residual_norm.py`).
"""

# pyright takes a kernel for a plain function
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .residual_norm import LEAST_WIDTH, cosine, tile_constants
from .tuned import find_settings


@triton.jit(do_not_specialize=["N"])
def _kernel(
    x_ptr, reference_ptr, norm_ptr, reference_norm_ptr, difference_ptr, cosine_ptr,
    N, D, x_stride, reference_stride,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row · stride overflows int32
    rows, columns, there = row[:, None], tl.arange(0, BLOCK_D)[None, :], row < N
    mask = rows < N
    if MASKED:
        mask = mask & (columns < D)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0)
    reference = tl.load(reference_ptr + rows * reference_stride + columns, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + row, mask=there, other=1.0)
    reference_norm = tl.load(reference_norm_ptr + row, mask=there, other=1.0)
    x, reference = x.to(tl.float32), reference.to(tl.float32)
    apart = x - reference
    difference = tl.sqrt_rn(tl.sum(apart * apart, 1))
    tl.store(difference_ptr + row, difference, mask=there)
    products = tl.sum(x * reference, 1)
    tl.store(cosine_ptr + row, cosine(products, difference, norm, reference_norm), mask=there)


def residual_distance(
    x_ND: Tensor, reference_ND: Tensor, norm_N: Tensor, reference_norm_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns ‖x − reference‖ and the cosine of the two for every row, float32 [N] each.

    Args:
        x_ND, reference_ND: one shape and dtype, contiguous in D, rows at any distance.
        norm_N, reference_norm_N: their rows' norms, float32 and contiguous.
    Raises:
        ValueError: shapes or dtypes differ, D is not contiguous, or the table has no settings for it.
    """
    N, D = x_ND.shape
    if reference_ND.shape != x_ND.shape or reference_ND.dtype != x_ND.dtype:
        raise ValueError(
            f"reference is {tuple(reference_ND.shape)}, {reference_ND.dtype}: not as x, {N} x {D}"
        )
    if D > 1 and (x_ND.stride(1) != 1 or reference_ND.stride(1) != 1):
        raise ValueError("rows of x and of its reference must be contiguous")
    difference_N, cosine_N = (torch.empty(N, dtype=torch.float32, device=x_ND.device) for _ in range(2))
    # cut up as the residual add is
    settings = find_settings("residual_norm", max(D, LEAST_WIDTH), x_ND.dtype, x_ND.device)
    _kernel[(triton.cdiv(N, settings.rows),)](
        *(x_ND, reference_ND, norm_N.contiguous(), reference_norm_N.contiguous(), difference_N, cosine_N),
        *(N, D, x_ND.stride(0), reference_ND.stride(0)),
        **tile_constants(settings, D),
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        enable_fp_fusion=True,
    )
    return difference_N, cosine_N
