"""Figures of convergence: distances of residuals and attention to the next recurrence and to the last."""

from collections.abc import Sequence

import numpy as np

from ..findings import Findings
from ..thresholds import CONVERGED_STEP, SETTLED_ENTROPY
from ..verdicts import first_below
from .marks import Figure
from .panels import grouped_figure
from .words import core_values, measure_in_words, number

_NEAR = 0.01  # "within 1 % of the last state"


def steps(findings: Sequence[Findings]) -> Figure | None:
    """How far one recurrence moves each layer's residual: relative norm and cosine (figure 3)."""
    return grouped_figure(
        findings,
        name="steps",
        title="Steps from one recurrence to the next",
        paper="figure 3",
        x="recurrence",
        group="layer",
        measures=("relative_step", "step_cosine"),
        thresholds={"relative_step": (CONVERGED_STEP, f"converged at {CONVERGED_STEP:g}")},
        caption="How far one recurrence moves each layer's residual, over the residual's norm, and the "
        "cosine of the residuals before and after.",
        seen=_steps_seen,
    )


def distance_to_the_fixed_point(findings: Sequence[Findings]) -> Figure | None:
    """Distance of each layer's residual to its own after the last recurrence (figure 4)."""
    return grouped_figure(
        findings,
        name="distance_to_the_fixed_point",
        title="Distance to the state after the last recurrence",
        paper="figure 4",
        x="recurrence",
        group="layer",
        measures=("relative_gap",),
        caption="Distance of each layer's residual to its own after the last recurrence, the approximate "
        "fixed point, over the norm there.",
        seen=_distance_seen,
    )


def attention_settling(findings: Sequence[Findings]) -> Figure | None:
    """How much each layer's attention still changes from one recurrence to the next (as figure 2 claims)."""
    return grouped_figure(
        findings,
        name="attention_settling",
        title="Attention settling",
        paper="the claim of figure 2",
        x="recurrence",
        group="layer",
        measures=("entropy_change", "received_change"),
        thresholds={"entropy_change": (SETTLED_ENTROPY, f"settled at {SETTLED_ENTROPY:g} nat")},
        caption="How much attention changes from one recurrence to the next: the absolute change of a row's "
        "entropy, and the total variation of what keys receive, means over queries and heads.",
        seen=_settling_seen,
    )


def attention_distances(findings: Sequence[Findings]) -> Figure | None:
    """Distance of each layer's attention to its own one recurrence earlier and after the last (figure 2)."""
    return grouped_figure(
        findings,
        name="attention_distances",
        title="Attention against the recurrence before and the last",
        paper="figure 2",
        x="recurrence",
        group="layer",
        measures=("attention_step", "attention_gap"),
        caption="Frobenius distance of each layer's attention matrix to its own one recurrence earlier, and "
        "to its own after the last recurrence, mean over heads.",
        seen=_distances_seen,
    )


def _steps_seen(each: Findings) -> str:
    step_RL = core_values(each, "relative_step")
    if step_RL is None:
        return ""
    worst_R = step_RL.max(axis=1)
    last, layer = len(worst_R) - 1, int(step_RL[-1].argmax())
    text = f"In {each.label} the step {_course(worst_R, ' of the norm')} (slowest at the end: layer {layer})"
    below = first_below(worst_R, CONVERGED_STEP)
    after = f", below {number(CONVERGED_STEP)} from recurrence {below} on" if below is not None else ""
    cosine_RL = core_values(each, "step_cosine")
    turn = (
        f"; the least cosine at recurrence {last} is {cosine_RL[-1].min():.6g}"
        if cosine_RL is not None
        else ""
    )
    return f"{text}{after}{turn}."


def _distance_seen(each: Findings) -> str:
    gap_RL = core_values(each, "relative_gap")
    if gap_RL is None:
        return ""
    worst_R = gap_RL.max(axis=1)[:-1]  # the last is its own reference
    near = first_below(worst_R, _NEAR)
    if near is None:
        text = (
            f"In {each.label} layers are still {number(worst_R[-1])} of the norm away one recurrence before "
        )
        return text + "the last: the reference itself is no fixed point yet."
    text = f"In {each.label} every layer is within {_NEAR:.0%} of its last state from recurrence {near} on"
    floor = worst_R.min()
    above = np.flatnonzero(worst_R > max(10 * floor, 1e-30))
    if len(above) > 2 and above[-1] > 1 and (above == np.arange(len(above))).all():
        start = 1 if above[-1] > 2 else 0
        factor = (worst_R[start] / worst_R[above[-1]]) ** (1 / (above[-1] - start))
        text += f"; until recurrence {above[-1]} each recurrence divides the distance by {number(factor)}"
    return f"{text}; the smallest distance is {number(floor)}."


def _settling_seen(each: Findings) -> str:
    change_RL = core_values(each, "entropy_change")
    if change_RL is None:
        return ""
    worst_R = change_RL.max(axis=1)
    settled = first_below(worst_R, SETTLED_ENTROPY)
    text = f"In {each.label} the change of row entropy {_course(worst_R, ' nat')}"
    moved_RL = core_values(each, "received_change")
    if moved_RL is not None:
        text += f", and {number(moved_RL[1].max())} of the attention moves to other keys at recurrence 1"
        text += f", {number(moved_RL[-1].max())} at the last"
    on = "it never stays" if settled is None else f"from recurrence {settled} on it stays"
    return f"{text}; {on} at or below {SETTLED_ENTROPY:g} nat."


def _distances_seen(each: Findings) -> str:
    parts = []
    for name in ("attention_step", "attention_gap"):
        value_RL = core_values(each, name)
        if value_RL is not None and len(value_RL) > 1:
            worst_R = value_RL.max(axis=1)  # the last gap is 0 by its definition
            course = _course(worst_R[:-1] if name == "attention_gap" and len(worst_R) > 2 else worst_R, "")
            parts.append(f"the largest {measure_in_words(name)} of a layer {course}")
    return f"In {each.label} {', '.join(parts)}." if parts else ""


def _course(value_R: np.ndarray, unit: str) -> str:
    """How a series runs from recurrence 1 to its end."""
    first, last, end = value_R[1], value_R[-1], len(value_R) - 1
    if end == 1:
        return f"is {number(first)}{unit} at recurrence 1, the last"
    verb = "falls" if last < first / 2 else "grows" if last > 2 * first else "goes"
    return f"{verb} from {number(first)}{unit} at recurrence 1 to {number(last)} at recurrence {end}"
