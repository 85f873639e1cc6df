"""The boundary of convergence: the gain from which on a random loop's last step is over the threshold.

Between two gains of a grid it is found by interpolation: the logarithm of the last step is taken as linear in
the logarithm of the gain. The bracket says how far off that can be.

Source: ours, beyond arXiv 2604.11791, section 4.2. The threshold is that of the verdict on convergence.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from ...capture.store.cell import AXES
from ...errors import UnfitError
from ..thresholds import CONVERGED_STEP, EPSILON

ROUNDING = EPSILON["float32"]  # a last step below it, 0 included, says only that the loop stands still
AXES_BUT_GAIN = [name for name in AXES if name != "gain"]


class Crossing(NamedTuple):
    """The gain at which convergence ends, coming from small gains.

    Without such a place `gain` is infinite where every gain converges, and 0 where the smallest does not.
    """

    gain: float
    low: float
    """largest gain of the grid below it; 0 where there is none"""
    high: float
    """smallest gain of the grid above it; infinite where there is none"""
    changes: int
    """how often the answer changes from one gain to the next; more than once: there is convergence beyond"""


def find_crossing(gain_G: np.ndarray, step_G: np.ndarray, threshold: float = CONVERGED_STEP) -> Crossing:
    """Finds the gain at which a series of last steps first rises over the threshold.

    Args:
        gain_G: gains in rising order, positive [gain].
        step_G: last step over the norm at each, [gain]; those that are no numbers are left out.
    Raises:
        UnfitError: none is a number.
    """
    finite_G = np.isfinite(step_G)
    if not finite_G.any():
        raise UnfitError(f"no last step is a number at the gains {', '.join(f'{gain:g}' for gain in gain_G)}")
    gain_G, step_G = gain_G[finite_G], np.maximum(step_G[finite_G], ROUNDING)
    above_G = step_G > threshold
    changes = int((above_G[1:] != above_G[:-1]).sum())
    if not above_G.any():
        return Crossing(np.inf, float(gain_G[-1]), np.inf, changes)
    first = int(above_G.argmax())
    if first == 0:
        return Crossing(0.0, 0.0, float(gain_G[0]), changes)
    around = slice(first - 1, first + 1)
    gain = np.exp(np.interp(np.log(threshold), np.log(step_G[around]), np.log(gain_G[around])))
    return Crossing(float(gain), float(gain_G[first - 1]), float(gain_G[first]), changes)


def boundary_table(captures: pd.DataFrame) -> pd.DataFrame:
    """Finds where convergence ends in every combination that has several gains.

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
    for _, group in captures.groupby(AXES_BUT_GAIN, sort=False):
        if len(set(group["gain"])) > 1:
            seeds = [
                find_crossing(np.asarray(each["gain"]), np.asarray(each["last_step"]))
                for _, each in group.sort_values("gain").groupby("seed")
            ]
            rows.append({name: group[name].iloc[0] for name in AXES_BUT_GAIN} | _over_seeds(seeds))
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
