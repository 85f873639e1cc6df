"""The residual add with its norms, and what is measured of the residual that it leaves.

A block ends each of its halves with the same four moves: norm the branch (Ouro, OLMo-2), add it, norm the
stream (Huginn), norm the input of the next branch (pre-norm). One function does them in any combination,
because on a GPU they are one pass over memory; the statistics are taken of the stored, rounded residual.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Residual(NamedTuple):
    residual_ND: Tensor  # what the block leaves on the stream
    y_ND: Tensor  # input of the next branch; the residual itself where no norm stands there


class Distance(NamedTuple):
    norm_N: Tensor  # float32, ‖x − reference‖₂ in the units of x
    cosine_N: Tensor  # float32


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps): normed in float32, rounded to x's dtype, then weighted, as Llama's,
    Ouro's and Huginn's codes do (transformers' OLMo-2 weights before it rounds).
    """
    if x_ND.dtype == torch.float32:
        return F.rms_norm(x_ND, weight_D.shape, weight_D, eps)
    return F.rms_norm(x_ND.float(), weight_D.shape, None, eps).to(x_ND.dtype) * weight_D


def residual_norm(
    x_ND: Tensor,
    branch_ND: Tensor,
    *,
    eps: float,
    branch_weight_D: Tensor | None = None,
    stream_weight_D: Tensor | None = None,
    next_weight_D: Tensor | None = None,
) -> Residual:
    """x + branch, with an RMS norm wherever a weight is given: on the branch, on the sum, before the next
    branch.

    Args:
        x_ND: residual stream, [N, D]. branch_ND: attention or MLP output, same shape and dtype.
        eps: added to the mean square in every norm.
    """
    if branch_weight_D is not None:
        branch_ND = rms_norm(branch_ND, branch_weight_D, eps)
    residual_ND = x_ND + branch_ND
    if stream_weight_D is not None:
        residual_ND = rms_norm(residual_ND, stream_weight_D, eps)
    y_ND = residual_ND if next_weight_D is None else rms_norm(residual_ND, next_weight_D, eps)
    return Residual(residual_ND, y_ND)


def row_norm(x_ND: Tensor) -> Tensor:
    """‖x‖₂ of every row, float32 [N]."""
    return torch.linalg.vector_norm(x_ND, dim=-1, dtype=torch.float32)


def row_peak(x_ND: Tensor) -> Tensor:
    """max_j |x_j| of every row, float32 [N]."""
    # two passes: on a CPU at D = 576 aminmax takes 18 times as long, the ∞-norm 24 times
    return torch.maximum(x_ND.amax(-1), -x_ND.amin(-1)).float()


def distance(x_ND: Tensor, reference_ND: Tensor, norm_N: Tensor, reference_norm_N: Tensor) -> Distance:
    """How far each row of x is from its reference, as ‖x − y‖₂ and as a cosine.

    Near 1 the cosine comes from 1 − cos = (‖x−y‖² − (‖x‖−‖y‖)²) / (2‖x‖‖y‖), whose terms are small when the
    two
    are close: float32 keeps 1 − cos to a relative error near 1e-5 where the plain formula loses it all. Far
    from 1 the same expression is exact enough to stay inside float32 rounding.

    Args:
        x_ND, reference_ND: [N, D], same dtype; differences are taken in float32.
        norm_N, reference_norm_N: their `row_norm`.
    """
    norm_difference_N = row_norm(x_ND.float() - reference_ND.float())
    length_gap_N = norm_N - reference_norm_N
    numerator_N = (norm_difference_N - length_gap_N) * (norm_difference_N + length_gap_N)
    return Distance(norm_difference_N, 1 - numerator_N / (2 * norm_N * reference_norm_N))
