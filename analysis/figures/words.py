"""Words for sentences beside figures: numbers, places, measures, and the values they speak of."""

from collections.abc import Callable, Sequence

import numpy as np

from ..depth_axis import Depths
from ..findings import Findings
from ..measures import MEASURES


def captioned(drawn: str, seen: Callable[[Findings], str], findings: Sequence[Findings]) -> list[str]:
    """A caption: what is drawn, then what `seen` says of each capture, which may be nothing."""
    return [drawn, *filter(None, map(seen, findings))]


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


def measure_in_words(measure: str) -> str:
    """A measure's title inside a sentence."""
    title = MEASURES[measure].title
    return title if title.startswith("ColSum") else title.lower()


def core_values(each: Findings, name: str, looped: bool = True) -> np.ndarray | None:
    """A measure's values over the core, [recurrence, layer]; None where there is none or one is not finite.

    Args:
        looped: the values at recurrence 0 may be missing, as those of a step are.
    """
    core_RL = each.depths.core_RL
    if name not in each.measures or not len(core_RL):
        return None
    value_RL = each.measures[name].sel(statistic="value").values[core_RL]
    return value_RL if np.isfinite(value_RL[1 if looped else 0 :]).all() else None


def least_and_largest(value_D: np.ndarray) -> tuple[int, int]:
    """Depths of the least and the largest value; those that are NaN do not count."""
    return int(np.nanargmin(value_D)), int(np.nanargmax(value_D))
