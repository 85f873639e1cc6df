"""The residual add with its norms, and the statistics of the residual that it leaves.

A block ends each of its halves with the same four moves: norm the branch (Ouro, OLMo-2), add it, norm the
stream (Huginn), norm the input of the next branch (pre-norm). One function does them in any combination,
because on a GPU they are one pass over memory; the statistics are taken of the stored, rounded residual.
"""

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import register

# rows of what `residual_norm_statistics` measures
STATISTICS = (
    "residual_norm",
    "residual_peak",
    "update_norm",
    "step_norm",
    "step_cosine",
    "gap_norm",
    "gap_cosine",
)


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
    """Returns x + branch, with an RMS norm wherever a weight is given: on the branch, on the sum, before the
    next branch.

    Args:
        x_ND: residual stream, [N, D]. branch_ND: attention or MLP output, same shape and dtype.
        eps: added to the mean square in every norm.
    """
    residual_ND, y_ND = _residual_norm(x_ND, branch_ND, branch_weight_D, stream_weight_D, next_weight_D, eps)
    return Residual(residual_ND, residual_ND if next_weight_D is None else y_ND)


def residual_norm_statistics(
    x_ND: Tensor,
    branch_ND: Tensor,
    *,
    eps: float,
    branch_weight_D: Tensor | None = None,
    stream_weight_D: Tensor | None = None,
    next_weight_D: Tensor | None = None,
    block_input_ND: Tensor | None = None,
    previous_ND: Tensor | None = None,
    last_ND: Tensor | None = None,
) -> tuple[Residual, Tensor]:
    """Returns what `residual_norm` does, and statistics of the stored, rounded residual.

    The statistics are float32 [7, N], in the order of STATISTICS.

    Args:
        block_input_ND: what update_norm is measured from. previous_ND: what step_norm and step_cosine are.
            last_ND: what gap_norm and gap_cosine are. Without one its rows are NaN. Shape and dtype of x.
    """
    residual_ND, y_ND, statistics_SN = _residual_norm_statistics(
        x_ND,
        branch_ND,
        branch_weight_D,
        stream_weight_D,
        next_weight_D,
        eps,
        block_input_ND,
        previous_ND,
        last_ND,
    )
    return Residual(residual_ND, residual_ND if next_weight_D is None else y_ND), statistics_SN


def residual_statistics(
    x_ND: Tensor,
    block_input_ND: Tensor | None = None,
    previous_ND: Tensor | None = None,
    last_ND: Tensor | None = None,
) -> Tensor:
    """Returns the statistics of residuals that are there already, on any device.

    Args:
        x_ND: residuals as they are stored, float [N, D].
        block_input_ND, previous_ND, last_ND: what they are compared with, as for `residual_norm_statistics`.
    Returns:
        float32 [7, N], rows as STATISTICS; NaN in the rows whose reference is not given.
    """
    statistics_SN = x_ND.new_full((len(STATISTICS), len(x_ND)), float("nan"), dtype=torch.float32)

    def put(name: str, value_N: Tensor) -> None:
        statistics_SN[STATISTICS.index(name)] = value_N

    norm_N = row_norm(x_ND)
    put("residual_norm", norm_N)
    put("residual_peak", row_peak(x_ND))
    if block_input_ND is not None:
        put("update_norm", row_norm(x_ND.float() - block_input_ND.float()))
    for kind, reference_ND in (("step", previous_ND), ("gap", last_ND)):
        if reference_ND is not None:
            measured = distance(x_ND, reference_ND, norm_N, row_norm(reference_ND))
            put(f"{kind}_norm", measured.norm_N)
            put(f"{kind}_cosine", measured.cosine_N)
    return statistics_SN


def row_norm(x_ND: Tensor) -> Tensor:
    """Returns ‖x‖₂ of every row, float32 [N]."""
    return torch.linalg.vector_norm(x_ND, dim=-1, dtype=torch.float32)


def row_peak(x_ND: Tensor) -> Tensor:
    """Returns max_j |x_j| of every row, float32 [N]."""
    # two passes: on a CPU at D = 576 aminmax takes 18 times as long, the ∞-norm 24 times
    return torch.maximum(x_ND.amax(-1), -x_ND.amin(-1)).float()


def distance(x_ND: Tensor, reference_ND: Tensor, norm_N: Tensor, reference_norm_N: Tensor) -> Distance:
    """Returns the distance of each row of x from its reference, as ‖x − y‖₂ and as a cosine.

    Near 1 the cosine comes from 1 − cos = (‖x−y‖² − (‖x‖−‖y‖)²) / (2‖x‖‖y‖), whose terms are small when the
    two are close: float32 keeps 1 − cos to a relative error near 1e-5 where the plain formula loses it all.
    Where ‖x−y‖ is not below ‖x‖ / 2 it is the plain formula that holds: of lengths that differ much, squares
    cancel.

    Args:
        x_ND, reference_ND: [N, D], same dtype; differences are taken in float32.
        norm_N, reference_norm_N: their `row_norm`.
    """
    return Distance(*_distance(x_ND, reference_ND, norm_N, reference_norm_N))


def _residual_norm_cpu(
    x_ND: Tensor,
    branch_ND: Tensor,
    branch_weight_D: Tensor | None,
    stream_weight_D: Tensor | None,
    next_weight_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if branch_weight_D is not None:
        branch_ND = rms_norm(branch_ND, branch_weight_D, eps)
    residual_ND = x_ND + branch_ND
    if stream_weight_D is not None:
        residual_ND = rms_norm(residual_ND, stream_weight_D, eps)
    # no operation may return one tensor twice
    y_ND = residual_ND.new_empty(0) if next_weight_D is None else rms_norm(residual_ND, next_weight_D, eps)
    return residual_ND, y_ND


def _residual_norm_statistics_cpu(
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
    residual_ND, y_ND = _residual_norm_cpu(
        x_ND, branch_ND, branch_weight_D, stream_weight_D, next_weight_D, eps
    )
    statistics_SN = residual_statistics(residual_ND, block_input_ND, previous_ND, last_ND)
    return residual_ND, y_ND, statistics_SN


def _residual_norm_fake(
    x_ND: Tensor,
    branch_ND: Tensor,
    branch_weight_D: Tensor | None,
    stream_weight_D: Tensor | None,
    next_weight_D: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    def promoted(dtype: torch.dtype, *others: Tensor | None) -> torch.dtype:
        given = (other.dtype for other in others if other is not None)
        return reduce(torch.promote_types, given, dtype)

    residual_dtype = promoted(x_ND.dtype, branch_ND, branch_weight_D, stream_weight_D)
    y_shape = (0,) if next_weight_D is None else x_ND.shape
    y_ND = x_ND.new_empty(y_shape, dtype=promoted(residual_dtype, next_weight_D))
    return x_ND.new_empty(x_ND.shape, dtype=residual_dtype), y_ND


def _residual_norm_statistics_fake(x_ND: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _residual_norm_fake(x_ND, *arguments[:5])
    return *outputs, x_ND.new_empty((len(STATISTICS), x_ND.shape[0]), dtype=torch.float32)


def _distance_cpu(
    x_ND: Tensor, reference_ND: Tensor, norm_N: Tensor, reference_norm_N: Tensor
) -> tuple[Tensor, Tensor]:
    difference_N = row_norm(x_ND.float() - reference_ND.float())
    length_gap_N = norm_N - reference_norm_N
    # products of two lengths would overflow where the lengths do not
    below_N, above_N = difference_N - length_gap_N, difference_N + length_gap_N
    cosine_N = 1 - below_N / (2 * norm_N) * (above_N / reference_norm_N)
    far = (~(difference_N < norm_N / 2)).nonzero().squeeze(1)
    unit_FD, reference_FD = (
        rows_ND[far].float() / lengths_N[far, None]
        for rows_ND, lengths_N in ((x_ND, norm_N), (reference_ND, reference_norm_N))
    )
    cosine_N[far] = torch.linalg.vecdot(unit_FD, reference_FD)
    return difference_N, cosine_N


_INPUTS = (
    "Tensor x, Tensor branch, Tensor? branch_weight, Tensor? stream_weight, Tensor? next_weight, float eps"
)

_residual_norm = register(
    f"residual_norm({_INPUTS}) -> (Tensor residual, Tensor y)",
    cpu=_residual_norm_cpu,
    fake=_residual_norm_fake,
    gpu="residual_norm",
)
_residual_norm_statistics = register(
    f"residual_norm_statistics({_INPUTS}, Tensor? block_input, Tensor? previous, Tensor? last) -> "
    "(Tensor residual, Tensor y, Tensor statistics)",
    cpu=_residual_norm_statistics_cpu,
    fake=_residual_norm_statistics_fake,
    gpu="residual_norm",
)
_distance = register(
    "residual_distance(Tensor x, Tensor reference, Tensor norm, Tensor reference_norm) -> "
    "(Tensor difference, Tensor cosine)",
    cpu=_distance_cpu,
    fake=lambda x, reference, norm, reference_norm: (torch.empty_like(norm), torch.empty_like(norm)),
    gpu="residual_distance",
)
