"""Every attention head for itself: which heads settle from one recurrence to the next, which are sinks.

A curve over depth is a mean over heads, which hides the one head that still moves. Each measure is an
analysis of its own, so that memory holds one quantity of a unit at a time.

Source: arXiv 2604.11791, sections 3 and 4 and appendix B, whose measures are defined by head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from .. import by_head
from ..depth_axis import Depths
from ..folds import STATISTICS, MeanFold
from ..measures import MEASURES
from ..streaming import Arrays
from ..walk import Analysis, merged, walk

_PREFIX = "heads_"


@dataclass(frozen=True)
class HeadMeasure:
    """One number a head. `of_sequence` gives [depth, head]; title and unit are the curve's over depth."""

    name: str
    of_sequence: Callable[[Arrays, Depths], np.ndarray]
    definition: str


def _mean(quantity: str) -> Callable[[Arrays, Depths], np.ndarray]:
    return lambda arrays, depths: by_head.mean(arrays, quantity)


HEAD_MEASURES: dict[str, HeadMeasure] = {
    each.name: each
    for each in (
        HeadMeasure(
            "entropy_change",
            by_head.entropy_change,
            "mean absolute change of a row's entropy since the recurrence before",
        ),
        HeadMeasure("sink_score", _mean("attention_sink"), "mean attention to the first keys over queries"),
        HeadMeasure("mixing_score", _mean("attention_entropy"), "mean entropy of attention rows"),
        HeadMeasure(
            "colsum_concentration",
            lambda arrays, depths: by_head.concentration(arrays),
            "1 + sum c ln c / ln T over the share c that each of T keys receives",
        ),
        HeadMeasure("attention_peak", _mean("attention_peak"), "mean largest weight of attention rows"),
        HeadMeasure(
            "attention_step",
            _mean("attention_step"),
            "Frobenius distance of the attention matrix to the same head's one recurrence earlier",
        ),
        HeadMeasure(
            "attention_gap",
            _mean("attention_gap"),
            "Frobenius distance of the attention matrix to the same head's after the last recurrence",
        ),
    )
}


class _HeadsFold:
    def __init__(self, each: HeadMeasure, dataset: xr.Dataset, depths: Depths) -> None:
        self._each, self._depths = each, depths
        self._fold = MeanFold((len(depths), dataset.sizes["head"]))

    def add(self, arrays: Arrays) -> None:
        self._fold.add(self._each.of_sequence(arrays, self._depths))

    def result(self) -> xr.Dataset:
        name, depths = self._each.name, self._depths
        value = self._fold.result()
        about = {"units": MEASURES[name].unit, "long_name": MEASURES[name].title}
        about["definition"] = f"{self._each.definition}; mean over sequences with a 95 % band"
        coordinates = {"statistic": list(STATISTICS), "depth": np.arange(len(depths))}
        coordinates["head"] = np.arange(value.shape[2])
        for key in ("stage", "layer", "recurrence"):
            coordinates[key] = ("depth", getattr(depths, key))
        return xr.Dataset({name: (("statistic", "depth", "head"), value, about)}, coordinates)


def _analysis(each: HeadMeasure) -> Analysis:
    about = MEASURES[each.name]
    return Analysis(
        _PREFIX + each.name,
        f"{about.title} by head",
        about.needs,
        each.definition,
        partial(_HeadsFold, each),
        about.first,
    )


ANALYSES = [_analysis(each) for each in HEAD_MEASURES.values()]


def heads(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Attention measures of every head at every depth: means over sequences of means over tokens.

    Returns:
        Dataset: a variable [statistic, depth, head] for each of `HEAD_MEASURES` that the captured quantities
        allow, float64, with its unit, title and definition; statistics are value, low, high (a 95 % band
        over sequences) and sequences. Coordinates stage, layer and recurrence on depth. Attribute `missing`
        (measure -> why it is absent). NaN where a measure is not defined.
    Raises:
        CannotTellError: no attention was captured; the message says what to capture.
        NothingCapturedError: no sequence is finished yet.
    """
    return gathered(walk(store, ANALYSES))


def gathered(answers: Mapping[str, xr.Dataset | str]) -> xr.Dataset:
    """Returns what a walk found of all heads, as `heads` does."""
    return merged(answers, HEAD_MEASURES, _PREFIX)


def long_table(found: xr.Dataset) -> pd.DataFrame:
    """Returns a table, a row per measure, depth and head: value, band, number of sequences, unit."""
    parts = []
    for name, values in found.data_vars.items():
        columns = {str(key): values.sel(statistic=key, drop=True) for key in STATISTICS}
        table = xr.Dataset(columns).to_dataframe().reset_index()
        table.insert(0, "measure", name)
        parts.append(table.assign(units=values.attrs["units"]))
    return pd.concat(parts, ignore_index=True)
