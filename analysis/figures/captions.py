"""What is seen in each figure, in words, with the numbers of the captures at hand."""

from collections.abc import Callable, Sequence

import numpy as np

from ..depths import Depths
from ..findings import Findings
from ..measures import MEASURES, SINK_SCORE
from ..verdicts import CONVERGED_STEP, SETTLED_ENTROPY, first_below

_NEAR = 0.01  # "within 1 % of the last state"
_UNSETTLED = 0.05  # "95 % of the tokens have settled"
_CLOSED = 0.01  # a path whose last two laps differ by less than 1 % of the lap's width has closed to the eye


def caption(figure: str, findings: Sequence[Findings]) -> list[str]:
    """Sentences for a figure: what is drawn, then what each capture that is drawn shows."""
    drawn, seen = _CAPTIONS[figure]
    sentences = [seen(each) for each in findings]
    return [drawn.format(sink_score=SINK_SCORE), *(sentence for sentence in sentences if sentence)]


def number(value: float | None) -> str:
    """Two or three significant digits, with an exponent where the zeros would have to be counted."""
    if value is None or not np.isfinite(value):
        return "none"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def place(depths: Depths, depth: int) -> str:
    """A depth in words."""
    layer, recurrence = depths.layer[depth], depths.recurrence[depth]
    if not len(depths.core_RL):
        return f"layer {layer}"
    stage = depths.stages[depths.stage[depth]]
    return f"{stage} layer {layer}" + (f", recurrence {recurrence}" if recurrence >= 0 else "")


def _steps(each: Findings) -> str:
    step_RL = _core(each, "relative_step")
    if step_RL is None:
        return ""
    worst_R = step_RL.max(axis=1)
    last, layer = len(worst_R) - 1, int(step_RL[-1].argmax())
    text = f"In {each.label} the step {_course(worst_R, ' of the norm')} (slowest at the end: layer {layer})"
    below = first_below(worst_R, CONVERGED_STEP)
    after = f", below {number(CONVERGED_STEP)} from recurrence {below} on" if below is not None else ""
    cosine_RL = _core(each, "step_cosine")
    turn = (
        f"; the least cosine at recurrence {last} is {cosine_RL[-1].min():.6g}"
        if cosine_RL is not None
        else ""
    )
    return f"{text}{after}{turn}."


def _distance(each: Findings) -> str:
    gap_RL = _core(each, "relative_gap")
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


def _trajectory(each: Findings) -> str:
    path = each.answers["trajectory"]
    if isinstance(path, str):
        return ""
    share = float(path["explained"].values[:2].sum())
    text = f"In {each.label} the plane holds {share:.0%} of the variance"
    recurrence, position = path["recurrence"].values, path["position"].values[:, :2]
    laps = [position[recurrence == index] for index in range(int(recurrence.max()) + 1)]
    if len(laps) < 2 or len(laps[-1]) != len(laps[-2]) or len(laps[-1]) < 2:
        return text + "."
    width = np.linalg.norm(laps[-1][:, None] - laps[-1][None], axis=-1).max()
    moved = np.linalg.norm(laps[-1] - laps[-2], axis=-1).max()
    if width == 0:
        return f"{text}; all layers end on one point."
    ending = "the path has closed into a cycle" if moved < _CLOSED * width else "the path has not closed"
    return f"{text}; {ending}: the last lap moves by {number(moved / width)} of its width."


def _settling(each: Findings) -> str:
    change_RL = _core(each, "entropy_change")
    if change_RL is None:
        return ""
    worst_R = change_RL.max(axis=1)
    settled = first_below(worst_R, SETTLED_ENTROPY)
    text = f"In {each.label} the change of row entropy {_course(worst_R, ' nat')}"
    moved_RL = _core(each, "received_change")
    if moved_RL is not None:
        text += f", and {number(moved_RL[1].max())} of the attention moves to other keys at recurrence 1"
        text += f", {number(moved_RL[-1].max())} at the last"
    on = "it never stays" if settled is None else f"from recurrence {settled} on it stays"
    return f"{text}; {on} at or below {SETTLED_ENTROPY:g} nat."


def _attention_distances(each: Findings) -> str:
    parts = []
    for name in ("attention_step", "attention_gap"):
        value_RL = _core(each, name)
        if value_RL is not None and len(value_RL) > 1:
            worst_R = value_RL.max(axis=1)  # the last gap is 0 by its definition
            course = _course(worst_R[:-1] if name == "attention_gap" and len(worst_R) > 2 else worst_R, "")
            parts.append(f"the largest {_name(name)} of a layer {course}")
    return f"In {each.label} {', '.join(parts)}." if parts else ""


def _stages(each: Findings) -> str:
    parts = []
    for name, what in (
        ("mixing_score", "mixing runs from {low} to {high} nat"),
        ("sink_rate", "{low} to {high} of the heads are sinks"),
        ("colsum_concentration", "ColSum concentration runs from {low} to {high}"),
    ):
        if name in each.measures:
            value_D = each.measures[name].sel(statistic="value").values
            if np.isfinite(value_D).any():
                ends = _ends(value_D)
                low, high = _apart(*value_D[list(ends)])
                flat = f"{_name(name)} is {low} throughout"
                low, high = (
                    f"{low} ({place(each.depths, ends[0])})",
                    f"{high} ({place(each.depths, ends[1])})",
                )
                parts.append(flat if np.ptp(value_D[list(ends)]) == 0 else what.format(low=low, high=high))
    return f"In {each.label} {', '.join(parts)}." if parts else ""


def _repeating(each: Findings) -> str:
    parts = []
    for name in ("mixing_score", "colsum_concentration"):
        value_RL = _core(each, name, looped=False)
        if (
            value_RL is None
            or value_RL.shape[0] < 2
            or value_RL.shape[1] < 3
            or np.ptp(value_RL, axis=1).min() == 0
        ):
            continue
        agreement_R = [float(np.corrcoef(row, value_RL[-1])[0, 1]) for row in value_RL[:-1]]
        later = f" and at least {min(agreement_R[1:]):.2f} after it" if len(agreement_R) > 1 else ""
        parts.append(f"{_name(name)} {agreement_R[0]:.2f} at recurrence 0{later}")
    if not parts:
        return ""
    text = f"In {each.label} the profile over layers correlates with the last recurrence's by "
    return text + f"{'; '.join(parts)}."


def _by_layer(each: Findings) -> str:
    value_RL = _core(each, "mixing_score", looped=False)
    if value_RL is None or len(value_RL) < 2:
        return ""
    range_L = np.ptp(value_RL, axis=0)
    late_L = np.abs(value_RL[-1] - value_RL[1])
    return (
        f"In {each.label} the mixing score of layer {int(range_L.argmax())} moves most across recurrences, "
        f"by {number(range_L.max())} nat; between recurrence 1 and the last no layer moves by more than "
        f"{number(late_L.max())} nat, while layers differ by {number(np.ptp(value_RL[-1]))} nat."
    )


def _norms(each: Findings) -> str:
    if "residual_norm" not in each.measures:
        return ""
    value_D = each.measures["residual_norm"].sel(statistic="value").values
    if not np.isfinite(value_D).any():
        return f"In {each.label} no residual norm is finite."
    low, high = _ends(value_D)
    text = f"In {each.label} the mean norm runs from {number(value_D[low])} ({place(each.depths, low)}) "
    text += f"to {number(value_D[high])} ({place(each.depths, high)})"
    if "residual_peak_max" in each.measures:
        peak_D = each.measures["residual_peak_max"].sel(statistic="value").values
        top = _ends(peak_D)[1]
        ratio = number(peak_D[top] / value_D[top])
        text += f"; the largest channel of any token is {number(peak_D[top])} ({place(each.depths, top)}), "
        text += f"{ratio} of the mean norm there"
    return text + "."


def _entropy(each: Findings) -> str:
    if "residual_entropy" not in each.measures:
        return ""
    value_D = each.measures["residual_entropy"].sel(statistic="value").values
    if not np.isfinite(value_D).any():
        return f"In {each.label} no residual entropy is finite."
    low, high = _ends(value_D)
    text = f"In {each.label} it runs from {number(value_D[low])} nat ({place(each.depths, low)}) "
    text += f"to {number(value_D[high])} ({place(each.depths, high)})"
    value_RL = _core(each, "residual_entropy")
    if value_RL is not None and len(value_RL) > 1:
        moved = np.abs(value_RL[-1] - value_RL[0]).max()
        text += f"; from the first recurrence to the last a layer's changes by up to {number(moved)}"
    return text + "."


def _core(each: Findings, name: str, looped: bool = True) -> np.ndarray | None:
    """A measure's values over the core, [recurrence, layer]; None where one is not finite."""
    core_RL = each.depths.core_RL
    if name not in each.measures or not len(core_RL):
        return None
    value_RL = each.measures[name].sel(statistic="value").values[core_RL]
    return value_RL if np.isfinite(value_RL[1 if looped else 0 :]).all() else None


def _course(value_R: np.ndarray, unit: str) -> str:
    """How a series runs from recurrence 1 to its end."""
    first, last, end = value_R[1], value_R[-1], len(value_R) - 1
    if end == 1:
        return f"is {number(first)}{unit} at recurrence 1, the last"
    verb = "falls" if last < first / 2 else "grows" if last > 2 * first else "goes"
    return f"{verb} from {number(first)}{unit} at recurrence 1 to {number(last)} at recurrence {end}"


def _apart(low: float, high: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart."""
    if f"{low:.3g}" != f"{high:.3g}" or low == high:
        return number(low), number(high)
    digits = next((digits for digits in range(4, 9) if f"{low:.{digits}g}" != f"{high:.{digits}g}"), 9)
    return f"{low:.{digits}g}", f"{high:.{digits}g}"


def _name(measure: str) -> str:
    title = MEASURES[measure].title
    return title if title.startswith("ColSum") else title.lower()


def _ends(value_D: np.ndarray) -> tuple[int, int]:
    return int(np.nanargmin(value_D)), int(np.nanargmax(value_D))


def _lens(each: Findings) -> str:
    settled_R = _loop_state(each, "lens_settled")
    kl_R = _loop_state(each, "lens_kl")
    if settled_R is None or kl_R is None:
        return ""
    most = first_below(1 - settled_R, _UNSETTLED)
    text = f"In {each.label} {settled_R[0]:.0%} of the tokens have their last answer after recurrence 0"
    if most is not None and 0 < most < len(settled_R) - 1:  # at the last one it is true of any model
        text += f" and {1 - _UNSETTLED:.0%} from recurrence {most} on"
    text += f"; the divergence begins at {number(kl_R[0])} nat"
    return f"{text} and is {number(kl_R[-2])} at the last recurrence but one."


def _exit_gate(each: Findings) -> str:
    chance_R = _loop_state(each, "exit_probability")
    if chance_R is None:
        return ""
    mean = float((chance_R * np.arange(len(chance_R))).sum())
    text = f"In {each.label} the gate would leave most often after recurrence {int(chance_R.argmax())}"
    return f"{text} ({chance_R.max():.0%}), at {mean:.2f} on average."


def _loop_state(each: Findings, name: str) -> np.ndarray | None:
    """A measure of the loop state, [recurrence]; None where it was not captured or is not finite."""
    core_RL = each.depths.core_RL
    if name not in each.measures or not len(core_RL):
        return None
    value_R = each.measures[name].sel(statistic="value").values[core_RL[:, -1]]
    return value_R if np.isfinite(value_R).all() else None


_CAPTIONS: dict[str, tuple[str, Callable[[Findings], str]]] = {
    "steps": (
        "How far one recurrence moves each layer's residual, over the residual's norm, and the cosine of the "
        "residuals before and after.",
        _steps,
    ),
    "attention_distances": (
        "Frobenius distance of each layer's attention matrix to its own one recurrence earlier, and to its "
        "own after the last recurrence, mean over heads.",
        _attention_distances,
    ),
    "distance_to_the_fixed_point": (
        "Distance of each layer's residual to its own after the last recurrence, the approximate fixed "
        "point, over the norm there.",
        _distance,
    ),
    "residual_entropy": (
        "Matrix-based entropy of a sequence's residuals: low where all tokens point one way, at most the "
        "logarithm of the number of tokens.",
        _entropy,
    ),
    "trajectory": (
        "The residual of one token after every core block, in the order the blocks run, on the first two "
        "principal components of all these points; rings mark the last recurrence, and each capture has axes "
        "of its own.",
        _trajectory,
    ),
    "attention_settling": (
        "How much attention changes from one recurrence to the next: the absolute change of a row's entropy, "
        "and the total variation of what keys receive, means over queries and heads.",
        _settling,
    ),
    "stages_by_depth": (
        "Mixing score (entropy of attention rows), sink rate (share of heads that put {sink_score} or more "
        "on the first key) and ColSum concentration (0: all keys receive alike, 1: one receives all), along "
        "realised depth.",
        _stages,
    ),
    "stages_by_recurrence": (
        "The same three over the core's layers, one line a recurrence: where lines lie on one another, every "
        "recurrence repeats the same stages.",
        _repeating,
    ),
    "stages_by_layer": (
        "The same three over recurrences, one line a layer: a flat line is a layer that does the same in "
        "every recurrence.",
        _by_layer,
    ),
    "residual_norms": (
        "Norm of the residual and its largest absolute channel along realised depth; dashed: the largest "
        "channel of any token.",
        _norms,
    ),
    "lens": (
        "The loop state after each recurrence, read through the model's own final norm and head: divergence "
        "of the next-token distribution from the last one, share of tokens whose likeliest next token is the "
        "last one's already, entropy.",
        _lens,
    ),
    "exit_gate": (
        "Chance that the model's exit gate leaves after each recurrence; all recurrences were run.",
        _exit_gate,
    ),
}
