"""Figures of the residual's size and spread along realised depth."""

from collections.abc import Sequence

import numpy as np

from ..findings import Findings
from .marks import Figure
from .panels import depth_figure
from .words import core_values, least_and_largest, number, place


def residual_norms(findings: Sequence[Findings]) -> Figure | None:
    """Norm and largest channel of the residual along realised depth (figure 9)."""
    return depth_figure(
        findings,
        name="residual_norms",
        title="Residual norms by depth",
        paper="figure 9",
        rows=[("residual_norm",), ("residual_peak", "residual_peak_max")],
        caption="Norm of the residual and its largest absolute channel along realised depth; dashed: the "
        "largest channel of any token.",
        seen=_norms_seen,
    )


def residual_entropy(findings: Sequence[Findings]) -> Figure | None:
    """Matrix-based entropy of the residuals along realised depth (with figures 32 and 33)."""
    return depth_figure(
        findings,
        name="residual_entropy",
        title="Residual entropy by depth",
        paper="figures 32 and 33 by our reading",
        rows=[("residual_entropy",)],
        caption="Matrix-based entropy of a sequence's residuals: low where all tokens point one way, at most "
        "the logarithm of the number of tokens.",
        seen=_entropy_seen,
    )


def _norms_seen(each: Findings) -> str:
    if "residual_norm" not in each.measures:
        return ""
    value_D = each.measures["residual_norm"].sel(statistic="value").values
    if not np.isfinite(value_D).any():
        return f"In {each.label} no residual norm is finite."
    low, high = least_and_largest(value_D)
    text = f"In {each.label} the mean norm runs from {number(value_D[low])} ({place(each.depths, low)}) "
    text += f"to {number(value_D[high])} ({place(each.depths, high)})"
    if "residual_peak_max" in each.measures:
        peak_D = each.measures["residual_peak_max"].sel(statistic="value").values
        top = least_and_largest(peak_D)[1]
        ratio = number(peak_D[top] / value_D[top])
        text += f"; the largest channel of any token is {number(peak_D[top])} ({place(each.depths, top)}), "
        text += f"{ratio} of the mean norm there"
    return text + "."


def _entropy_seen(each: Findings) -> str:
    if "residual_entropy" not in each.measures:
        return ""
    value_D = each.measures["residual_entropy"].sel(statistic="value").values
    if not np.isfinite(value_D).any():
        return f"In {each.label} no residual entropy is finite."
    low, high = least_and_largest(value_D)
    text = f"In {each.label} it runs from {number(value_D[low])} nat ({place(each.depths, low)}) "
    text += f"to {number(value_D[high])} ({place(each.depths, high)})"
    value_RL = core_values(each, "residual_entropy")
    if value_RL is not None and len(value_RL) > 1:
        moved = np.abs(value_RL[-1] - value_RL[0]).max()
        text += f"; from the first recurrence to the last a layer's changes by up to {number(moved)}"
    return text + "."
