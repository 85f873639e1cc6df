"""Where convergence ends: the gain at which a random loop's last step rises over the verdict's threshold.

Between two gains of a grid it is found by interpolation: the logarithm of the last step is taken as linear in
the logarithm of the gain. The bracket says how far off that can be.

Source: ours. arXiv 2604.11791, section 4.2, varies neither gain nor embeddings.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from .verdicts import CONVERGED_STEP

ROUNDING = 2.0**-23  # of float32: a last step below it, 0 included, says only that the loop stands still
_AXES = ["norm", "injection", "layers", "recurrences", "width", "embedding_std"]


class Crossing(NamedTuple):
    """Where a series of last steps, by growing gain, first rises over the threshold.

    Without such a place `gain` is infinite where the largest gain converges, and 0 where none does.
    """

    gain: float
    low: float
    """largest gain of the grid below it; 0 where there is none"""
    high: float
    """smallest gain of the grid above it; infinite where there is none"""
    changes: int
    """how often the answer changes from one gain to the next: 1 where it is one boundary"""


def find_crossing(gain_G: np.ndarray, step_G: np.ndarray, threshold: float = CONVERGED_STEP) -> Crossing:
    """The first crossing of one series.

    Args:
        gain_G: gains in rising order, positive [gain].
        step_G: last step over the norm at each, [gain]; those that are no numbers are left out.
    """
    finite_G = np.isfinite(step_G)
    gain_G, step_G = gain_G[finite_G], np.maximum(step_G[finite_G], ROUNDING)
    above_G = step_G > threshold
    changes = int((above_G[1:] != above_G[:-1]).sum())
    rises = np.flatnonzero(~above_G[:-1] & above_G[1:])
    if not len(rises):
        ends_above = not len(gain_G) or bool(above_G[-1])
        edge = float(gain_G.min(initial=np.inf)) if ends_above else float(gain_G.max())
        return Crossing(0.0, 0.0, edge, changes) if ends_above else Crossing(np.inf, edge, np.inf, changes)
    below, above = int(rises[0]), int(rises[0]) + 1
    gain = np.exp(
        np.interp(np.log(threshold), np.log(step_G[[below, above]]), np.log(gain_G[[below, above]]))
    )
    return Crossing(float(gain), float(gain_G[below]), float(gain_G[above]), changes)


def boundary_table(captures: pd.DataFrame) -> pd.DataFrame:
    """Where convergence ends in every combination that has several gains.

    Args:
        captures: a row a capture, with the axes of the study and `last_step`.
    Returns:
        a row a combination without the gain: `critical_gain` (median over seeds; a median between a seed
        inside the grid and one beyond is beyond), `critical_gain_low` and `_high` (least and largest), NaN
        where beyond the grid; `bracket_low` and `_high`, the grid's gains around all seeds' crossings;
        `seeds`, `inside` (seeds whose crossing is inside the grid), `below`, `above` (it), and `changes`, the
        most of any seed.
    """
    rows = []
    for _, group in captures.groupby(_AXES, sort=False):
        if len(set(group["gain"])) > 1:
            seeds = [
                find_crossing(np.asarray(each["gain"]), np.asarray(each["last_step"]))
                for _, each in group.sort_values("gain").groupby("seed")
            ]
            rows.append({name: group[name].iloc[0] for name in _AXES} | _over_seeds(seeds))
    return pd.DataFrame(rows)


def _over_seeds(seeds: list[Crossing]) -> dict[str, float]:
    gains = np.sort([each.gain for each in seeds])
    middle = gains[[(len(gains) - 1) // 2, len(gains) // 2]]
    found = {
        "critical_gain": float(np.exp(np.log(middle).mean()))
        if 0 < middle[0] <= middle[1] < np.inf
        else np.nan
    }
    for end, value in (("low", gains[0]), ("high", gains[-1])):
        found[f"critical_gain_{end}"] = float(value) if 0 < value < np.inf else np.nan
    return found | {
        "bracket_low": min(each.low for each in seeds),
        "bracket_high": max(each.high for each in seeds),
        "seeds": len(seeds),
        "inside": int(((gains > 0) & (gains < np.inf)).sum()),
        "below": int((gains == 0).sum()),
        "above": int((gains == np.inf).sum()),
        "changes": max(each.changes for each in seeds),
    }
