"""The answers a capture gives: convergence, distinct fixed points, attention that settles, stages that
repeat, and whether all this lasts beyond the recurrences a model was trained with.

Each verdict carries its number, the threshold it was held to, where that is from and why that one, so that a
reader can disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from ..capture.store.plan import plan_of
from .answers.rates import slowest_half_life
from .answers.stages import STAGE_MEASURES
from .depth_axis import Depths, depths_of
from .measures import MEASURES
from .questions import CONVERGED, DISTINCT, REPEATED, SETTLED, STABLE, Question
from .thresholds import EPSILON, rounding_step

_ATTENTION_STAGES = tuple(name for name in STAGE_MEASURES if name != "residual_norm")

Answers = Mapping[str, xr.Dataset | str]  # what a walk found, or why not, by name of the analysis


@dataclass(frozen=True)
class Verdict:
    """A capture's answer to a question."""

    question: Question
    answer: bool | None
    """answer to the question; None if the capture cannot tell, and `detail` says why"""
    value: float | None
    recurrence: int | None
    """first recurrence from which the answer holds to the end"""
    detail: str

    @property
    def answer_in_words(self) -> str:
        return {True: "yes", False: "no", None: "cannot tell"}[self.answer]

    def row(self) -> dict[str, object]:
        """The verdict with its question, as a row of a table."""
        asked = self.question
        return {
            "name": asked.name,
            "question": asked.text,
            "answer": self.answer,
            "value": self.value,
            "threshold": asked.threshold,
            "relation": asked.relation,
            "unit": asked.unit,
            "recurrence": self.recurrence,
            "detail": self.detail,
            "reason": asked.reason,
            "source": asked.source,
            "figure": asked.figure,
        }


def verdicts(
    measures: xr.Dataset,
    distinctness: xr.Dataset | str,
    answers: Answers | None = None,
    trained: int | str = "the trained count is not known",
    reference: xr.Dataset | str = "",
) -> list[Verdict]:
    """Returns the verdicts of one capture.

    Args:
        measures: result of `measure`.
        distinctness: result of `distinctness`, or the reason why there is none.
        answers: what a walk with `ANALYSES` found, by name.
        trained: how many recurrences the model was trained with, or why that is not known.
        reference: agreement of the stages with a feedforward model's, if there is one.
    """
    depths, answers = depths_of(measures), answers or {}
    converged = _converged(measures, depths, answers)
    return [
        converged,
        _distinct(converged, distinctness),
        _settled(measures, depths),
        _repeated(measures, depths, answers, reference),
        _stable(measures, depths, trained),
    ]


def _converged(measures: xr.Dataset, depths: Depths, answers: Answers) -> Verdict:
    said = "the slowest layer's median step over its norm"
    found = _of_series(CONVERGED, measures, depths, "relative_step_median", said)
    answer, recurrence, detail = found.answer, found.recurrence, found.detail
    dtype = plan_of(measures).settings.dtype
    rounding = rounding_step(EPSILON[dtype])
    if answer is False and found.value is not None and found.value <= rounding:
        answer = None
        detail += (
            f"; rounding alone may make steps of {rounding:.1g} in {dtype}: "
            "capture with --dtype float32 to tell"
        )
    rates = answers.get("rates", "")
    if found.value is not None and isinstance(rates, xr.Dataset):
        half_life, num_R = slowest_half_life(rates), len(depths.core_RL)
        pace = f"halve in {half_life:.3g} recurrences" if np.isfinite(half_life) else "do not shrink"
        detail += f"; the slowest layer's steps {pace}"
        if answer and half_life > num_R and not _stands_still(measures, depths):
            answer, recurrence = False, None
            detail += f", and {num_R} recurrences ran: it drifts in small steps"
    detail += _ends(answers.get("limits", ""))
    return replace(found, answer=answer, recurrence=recurrence, detail=detail)


def _stands_still(measures: xr.Dataset, depths: Depths) -> bool:
    """Whether from half of the recurrences on no layer is further from its end than a converged step."""
    if "relative_gap_median" not in measures:
        return False
    gap_R = worst_over_layers(measures["relative_gap_median"].sel(statistic="value").values, depths)
    return bool((gap_R[len(gap_R) // 2 :] <= CONVERGED.threshold).all())


def _ends(limits: xr.Dataset | str) -> str:
    """Says where the tokens end up at the last core layer, whose curve the paper classifies."""
    if isinstance(limits, str):
        return ""
    share_C = limits["share"].sel(statistic="value").isel(layer=-1)
    words = ("at a fixed point", "on an orbit", "sliding", "otherwise")
    shares = (f"{float(share):.3g} % {how}" for share, how in zip(100 * share_C, words, strict=True) if share)
    return f"; tokens at the last layer end {', '.join(shares)}"


def _settled(measures: xr.Dataset, depths: Depths) -> Verdict:
    said = "the least settled layer's mean change of row entropy"
    return _of_series(SETTLED, measures, depths, "entropy_change", said)


def _distinct(converged: Verdict, distinctness: xr.Dataset | str) -> Verdict:
    value, answer, recurrence = None, None, None
    if isinstance(distinctness, str):
        detail = distinctness
    else:
        value = float(distinctness["least_cosine"].sel(statistic="value"))
        layer, other = distinctness.attrs["pair"]
        size = float(distinctness["cycle_size"].sel(statistic="value"))
        detail = f"the least mean cosine of two layers, {layer} and {other}, after the last recurrence; the "
        detail += f"layers lie {size:.2g} of the norm around their mean"
        if converged.answer:
            answer, recurrence = value < DISTINCT.threshold, converged.recurrence
        else:
            detail += "; without convergence there are no fixed points to tell apart"
    return Verdict(DISTINCT, answer, value, recurrence, detail)


def _repeated(measures: xr.Dataset, depths: Depths, answers: Answers, reference: xr.Dataset | str) -> Verdict:
    """Whether the recurrences after the first run through the layers as the last one does."""
    value, answer, recurrence = None, None, None
    least_R, parts, reasons = np.full(max(len(depths.core_RL) - 1, 0), np.inf), [], []
    for name in _ATTENTION_STAGES:
        found = answers.get(f"stages_{name}", "this was not asked of the capture")
        if isinstance(found, str):
            reasons.append(found)
            continue
        correlation_R = found["correlation"].sel(statistic="value").values[:-1]
        if np.isfinite(correlation_R).all() and not _is_flat(measures[name], depths):
            least_R = np.minimum(least_R, correlation_R)
            after = correlation_R[min(1, len(correlation_R) - 1) :]
            parts.append(f"{found.attrs['title'].removeprefix('Stages of ')} {after.min():.2f}")
        else:
            reasons.append("a profile over layers is flat: it correlates with nothing")
    detail = reasons[0] if reasons else ""
    if parts and len(least_R):
        value = float(least_R[min(1, len(least_R) - 1) :].min())
        recurrence = first_below(-least_R, -REPEATED.threshold)
        answer = value >= REPEATED.threshold
        detail = "the least correlation of a recurrence's profile over layers with the last one's, from "
        detail += "recurrence 1 on" if len(least_R) > 1 else "recurrence 0"
        detail += f": {', '.join(parts)}{_beside(reference)}"
    return Verdict(REPEATED, answer, value, recurrence, detail)


def _beside(reference: xr.Dataset | str) -> str:
    """Returns the correlations with a feedforward model's stages as text; empty without such a model."""
    if isinstance(reference, str):
        return ""
    value = reference["correlation"].sel(statistic="value")
    parts = [
        f"{MEASURES[name].title.lower()} {float(value.sel(measure=name).min()):.2f}"
        for name in _ATTENTION_STAGES
        if name in reference["measure"] and np.isfinite(value.sel(measure=name)).all()
    ]
    beside = f"{reference.attrs['reference']} ({reference.attrs['layers']})"
    return f"; beside {beside} the least of all recurrences: {', '.join(parts)}" if parts else ""


def _is_flat(curve: xr.DataArray, depths: Depths) -> bool:
    """Whether in some recurrence the layers differ by less than rounding in float32 makes them."""
    value_RL = curve.sel(statistic="value").values[depths.core_RL]
    return bool((np.ptp(value_RL, axis=1) <= 8 * EPSILON["float32"] * np.abs(value_RL).max(axis=1)).any())


def _stable(measures: xr.Dataset, depths: Depths, trained: int | str) -> Verdict:
    """Whether the states from the trained count on stay where the last recurrence leaves them."""
    value, answer, recurrence, num_R = None, None, None, len(depths.core_RL)
    if isinstance(trained, str) or num_R < 2:
        detail = trained if isinstance(trained, str) else "there is no second recurrence"
    elif num_R <= trained:
        detail = (
            f"{num_R} recurrences ran and the model was trained with {trained}: "
            f"capture again with --recurrences {4 * trained}"
        )
    else:
        found = _of_series(STABLE, measures, depths, "relative_gap_median", "")
        detail, recurrence = found.detail, found.recurrence
        if found.value is not None:
            gap_D = measures["relative_gap_median"].sel(statistic="value").values
            value = float(worst_over_layers(gap_D, depths)[trained - 1 : -1].max())
            answer = value <= STABLE.threshold
            detail = (
                f"the largest median distance of a layer to where recurrence {num_R - 1} leaves it, from "
            )
            detail += f"recurrence {trained - 1}, the last that was trained, on{found.detail}"
    return Verdict(STABLE, answer, value, recurrence, detail)


def _of_series(asked: Question, measures: xr.Dataset, depths: Depths, name: str, detail: str) -> Verdict:
    """Returns the answer of the slowest layer at the end, for a measure that must stay under a threshold."""
    if name not in measures:
        return Verdict(asked, None, None, None, measures.attrs["missing"][name])
    worst_R = worst_over_layers(measures[name].sel(statistic="value").values, depths)
    bad = int(measures["non_finite"].sel(quantity=list(measures[name].attrs["needs"])).sum())
    if bad:
        detail += f"; {bad} non-finite values are left out"
    if not np.isfinite(worst_R[-1]):
        return Verdict(asked, None, None, None, f"no finite value at the end; {detail}")
    value, recurrence = float(worst_R[-1]), first_below(worst_R, asked.threshold)
    return Verdict(asked, bool(worst_R[-1] <= asked.threshold), value, recurrence, detail)


def worst_over_layers(value_D: np.ndarray, depths: Depths) -> np.ndarray:
    """Returns the largest value over the core's layers, [recurrences]; NaN where a layer has none."""
    return value_D[depths.core_RL].max(axis=1)


def first_below(value_R: np.ndarray, threshold: float) -> int | None:
    """Returns the first recurrence from which a series stays at or below a threshold; None without one."""
    above = np.flatnonzero(~(value_R <= threshold))
    first = int(above[-1]) + 1 if len(above) else 0
    return first if first < len(value_R) else None
