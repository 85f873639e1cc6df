"""The axes of the architecture study, as its figures and page name, choose and colour them."""

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ...capture.store.cell import AXES, Cell
from ..figures.marks import LAYER_COLORS, spread_colors

# the axes that are numbers, in words
WORDS = {name: name.replace("_", " ") for name in AXES if name not in ("norm", "injection")}
# a figure that does not vary an axis takes the value nearest to the paper's
_PAPER = Cell("pre", True)


def label_of(norm: str, injection: bool) -> str:
    return f"{norm}, {'injection' if injection else 'no injection'}"


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    return np.asarray(table[name])


def values_of(table: pd.DataFrame, name: str) -> list[Any]:
    """Returns the values in a column, each once, in order."""
    return np.unique(column(table, name)).tolist()


def varying(table: pd.DataFrame) -> list[str]:
    """Axes, norms and injection aside, that have several values in a table."""
    return [name for name in WORDS if name in table and len(values_of(table, name)) > 1]


def near_the_paper(table: pd.DataFrame, axes: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The rows at one value of each of these axes, the nearest to the paper's by factors; and what was chosen
    where there was a choice, as the end of a subtitle.
    """
    chosen = []
    for name in varying(table):
        if name in axes:
            values = np.array(values_of(table, name))
            value = values[np.abs(np.log(values / getattr(_PAPER, name))).argmin()]
            table = pd.DataFrame(table[column(table, name) == value])
            chosen.append(f"{WORDS[name]} {value:g}")
    return table, f"; at {', '.join(chosen)}" if chosen else ""


def panels_of(table: pd.DataFrame, *more: str) -> Iterator[tuple[list[Any], pd.DataFrame]]:
    """The rows of every [injection, norm, *more]: those with injection first, norms as they were given."""
    norms = list(dict.fromkeys(table["norm"]))
    keys = list(dict.fromkeys(zip(*(table[name] for name in ("injection", "norm", *more)), strict=True)))
    for key in sorted(keys, key=lambda key: (not key[0], norms.index(key[1]), *key[2:])):
        is_here = np.ones(len(table), bool)
        for name, value in zip(("injection", "norm", *more), key, strict=True):
            is_here &= column(table, name) == value
        yield list(key), pd.DataFrame(table[is_here])


def color_of(name: str, values: Sequence[float]) -> alt.Color:
    """A colour for each value of an axis, amber to plum, as layers have in every other figure."""
    legend = alt.Legend(title=WORDS[name], symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2)
    scale = alt.Scale(domain=list(values), range=spread_colors(LAYER_COLORS, len(values)))
    return alt.Color(f"{name}:O", scale=scale, legend=legend if len(values) > 1 else None)
