"""Figures of the loop state after each recurrence, as the model's own head and its exit gate read it."""

from collections.abc import Sequence

import numpy as np

from ..findings import Findings
from ..verdicts import first_below
from .marks import Figure
from .panels import grouped_figure
from .words import number

_UNSETTLED = 0.05  # "95 % of the tokens have settled"


def lens(findings: Sequence[Findings]) -> Figure | None:
    """Predictions of the loop state after each recurrence, through the model's own head (logit lens)."""
    return grouped_figure(
        findings,
        name="lens",
        title="What the loop state predicts",
        paper="",
        x="recurrence",
        group="layer",
        measures=("lens_kl", "lens_settled", "lens_entropy"),
        at_loop_state=True,
        caption="The loop state after each recurrence, read through the model's own final norm and head: "
        "divergence of the next-token distribution from the last one, share of tokens whose likeliest next "
        "token is the last one's already, entropy.",
        seen=_lens_seen,
    )


def exit_gate(findings: Sequence[Findings]) -> Figure | None:
    """Recurrences at which the model's exit gate would leave the loop."""
    return grouped_figure(
        findings,
        name="exit_gate",
        title="Where the exit gate would leave",
        paper="",
        x="recurrence",
        group="layer",
        measures=("exit_probability",),
        at_loop_state=True,
        caption="Chance that the model's exit gate leaves after each recurrence; all recurrences were run.",
        seen=_exit_seen,
    )


def _lens_seen(each: Findings) -> str:
    settled_R = _values(each, "lens_settled")
    kl_R = _values(each, "lens_kl")
    if settled_R is None or kl_R is None:
        return ""
    most = first_below(1 - settled_R, _UNSETTLED)
    text = f"In {each.label} {settled_R[0]:.0%} of the tokens have their last answer after recurrence 0"
    if most is not None and 0 < most < len(settled_R) - 1:  # at the last one it is true of any model
        text += f" and {1 - _UNSETTLED:.0%} from recurrence {most} on"
    text += f"; the divergence begins at {number(kl_R[0])} nat"
    return f"{text} and is {number(kl_R[-2])} at the last recurrence but one."


def _exit_seen(each: Findings) -> str:
    chance_R = _values(each, "exit_probability")
    if chance_R is None:
        return ""
    mean = float((chance_R * np.arange(len(chance_R))).sum())
    text = f"In {each.label} the gate would leave most often after recurrence {int(chance_R.argmax())}"
    return f"{text} ({chance_R.max():.0%}), at {mean:.2f} on average."


def _values(each: Findings, name: str) -> np.ndarray | None:
    """A measure of the loop state, [recurrence]; None where it was not captured or is not finite."""
    core_RL = each.depths.core_RL
    if name not in each.measures or not len(core_RL):
        return None
    value_R = each.measures[name].sel(statistic="value").values[core_RL[:, -1]]
    return value_R if np.isfinite(value_R).all() else None
