"""The answers a capture gives: convergence, distinct fixed points, attention that settles.

Each verdict carries its number, the threshold it was held to and why that one, so that a reader can disagree.
"""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from .streaming import Depths, depths_of

# a step of a thousandth of the norm is far below what recurrences that still change show, and well above
# the 3e-7 where rounding stops a converged loop in float32
CONVERGED_STEP = 1e-3
# rounding keeps a loop at its fixed point moving: by 1.3 to 2.7 machine epsilons of the norm, seen in float32
# and bfloat16 with pre and Huginn norms (12 layers); a step over the threshold of up to 4 proves nothing
ROUNDING_STEPS = 4
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# two directions at cosine 0.999 are 2.6 degrees apart: nearer than that, layers share one point
DISTINCT_COSINE = 0.999
# one hundredth of a nat is 1 % of the entropy of a row spread over e keys: no eye sees it in an attention map
SETTLED_ENTROPY = 0.01


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One question with its answer; `answer` is None where the capture cannot tell, and `detail` says why."""

    name: str
    question: str
    answer: bool | None
    value: float | None
    threshold: float
    relation: str
    """what the value must be against the threshold for a yes: at most, or below"""
    unit: str
    recurrence: int | None
    """first recurrence from which the answer holds to the end"""
    detail: str
    reason: str
    """why this threshold"""
    figure: str
    """name of the figure that shows it"""


def verdicts(measures: xr.Dataset, distinctness: xr.Dataset | str) -> list[Verdict]:
    """The three verdicts of one capture.

    Args:
        measures: result of `measure`.
        distinctness: result of `distinctness`, or the reason why there is none.
    """
    depths = depths_of(measures)
    converged = _converged(measures, depths)
    return [converged, _distinct(converged, distinctness), _settled(measures, depths)]


def _converged(measures: xr.Dataset, depths: Depths) -> Verdict:
    answer = _series_answer(
        measures,
        depths,
        "relative_step_median",
        CONVERGED_STEP,
        "the slowest layer's median step over its norm",
    )
    dtype = measures.attrs["plan"]["settings"]["dtype"]
    rounding = ROUNDING_STEPS * _EPSILON[dtype]
    if answer["answer"] is False and answer["value"] <= rounding:
        answer["answer"] = None
        answer["detail"] += (
            f"; rounding alone may make steps of {rounding:.1g} in {dtype}: "
            "capture with --dtype float32 to tell"
        )
    return Verdict(
        name="converged",
        question="Does the loop converge?",
        threshold=CONVERGED_STEP,
        relation="at most",
        unit="of the norm",
        reason="a thousandth of the norm is far below what recurrences that still change show",
        figure="steps",
        **answer,
    )


def _settled(measures: xr.Dataset, depths: Depths) -> Verdict:
    answer = _series_answer(
        measures,
        depths,
        "entropy_change",
        SETTLED_ENTROPY,
        "the least settled layer's mean change of row entropy",
    )
    return Verdict(
        name="attention_settled",
        question="Does attention stop changing?",
        threshold=SETTLED_ENTROPY,
        relation="at most",
        unit="nat",
        reason="a hundredth of a nat is 1 % of the entropy of a row spread over e keys",
        figure="attention_settling",
        **answer,
    )


def _distinct(converged: Verdict, distinctness: xr.Dataset | str) -> Verdict:
    value, answer, recurrence = None, None, None
    if isinstance(distinctness, str):
        detail = distinctness
    else:
        value = float(distinctness["least_cosine"].sel(statistic="value"))
        layer, other = distinctness.attrs["pair"]
        detail = f"the least mean cosine of two layers, {layer} and {other}, after the last recurrence"
        if converged.answer:
            answer, recurrence = value < DISTINCT_COSINE, converged.recurrence
        else:
            detail += "; without convergence there are no fixed points to tell apart"
    return Verdict(
        name="distinct",
        question="Has each layer its own fixed point?",
        answer=answer,
        value=value,
        threshold=DISTINCT_COSINE,
        relation="below",
        unit="cosine",
        recurrence=recurrence,
        detail=detail,
        reason="directions at cosine 0.999 are 2.6 degrees apart: nearer than that, layers share one point",
        figure="trajectory",
    )


def _series_answer(measures: xr.Dataset, depths: Depths, name: str, threshold: float, detail: str) -> dict:
    if name not in measures:
        return {"answer": None, "value": None, "recurrence": None, "detail": measures.attrs["missing"][name]}
    worst_R = worst_over_layers(measures[name].sel(statistic="value").values, depths)
    bad = int(measures["non_finite"].sel(quantity=list(measures[name].attrs["needs"])).sum())
    if bad:
        detail += f"; {bad} non-finite values are left out"
    if not np.isfinite(worst_R[-1]):
        return {
            "answer": None,
            "value": None,
            "recurrence": None,
            "detail": f"no finite value at the end; {detail}",
        }
    return {
        "answer": bool(worst_R[-1] <= threshold),
        "value": float(worst_R[-1]),
        "recurrence": first_below(worst_R, threshold),
        "detail": detail,
    }


def worst_over_layers(value_D: np.ndarray, depths: Depths) -> np.ndarray:
    """Largest value over the core's layers at every recurrence, [recurrences]; NaN where a layer has none."""
    return value_D[depths.core_RL].max(axis=1)


def first_below(value_R: np.ndarray, threshold: float) -> int | None:
    """First recurrence from which a series stays at or below a threshold to its end; None if it does not."""
    above = np.flatnonzero(~(value_R <= threshold))
    first = int(above[-1]) + 1 if len(above) else 0
    return first if first < len(value_R) else None
