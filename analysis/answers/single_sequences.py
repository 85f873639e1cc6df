"""Single sequences beside the mean: whether a curve is what every sequence does, or a mean of unlike ones.

At most sixteen sequences are kept, the first of each of sixteen equal parts of the store, so that the same
store always shows the same ones and memory does not grow with it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from ..depth_axis import Depths
from ..measures import MEASURES
from ..streaming import Arrays
from ..walk import Analysis, merged, walk

SEQUENCE_MEASURES = (
    "relative_step",
    "relative_gap",
    "mixing_score",
    "sink_rate",
    "colsum_concentration",
    "residual_norm",
)
MOST_SEQUENCES = 16
_PREFIX = "sequences_"


def spread(num_sequences: int) -> np.ndarray:
    """Returns places, in the store's order, of sequences that stand for all: int [at most MOST_SEQUENCES]."""
    num_parts = min(num_sequences, MOST_SEQUENCES)
    return np.arange(num_parts) * num_sequences // num_parts


class _SequencesFold:
    def __init__(self, name: str, dataset: xr.Dataset, depths: Depths) -> None:
        self._measure, self._depths = MEASURES[name], depths
        length = dataset["sequence_length"].values
        finished = np.flatnonzero(length > 0)  # the order in which a walk goes through them
        chosen = spread(len(finished))
        self._row = {int(place): row for row, place in enumerate(chosen)}
        self._sequence_id = dataset["sequence_id"].values[finished[chosen]]
        self._num_tokens = length[finished[chosen]]
        self._value_SD = np.full((len(chosen), len(depths)), np.nan)
        self._place = 0

    def add(self, arrays: Arrays) -> None:
        if (row := self._row.get(self._place)) is not None:
            self._value_SD[row] = self._measure.curve(arrays, self._depths)
        self._place += 1

    def result(self) -> xr.Dataset:
        each, depths = self._measure, self._depths
        about = {"units": each.unit, "long_name": each.title, "definition": each.definition}
        coordinates = {"sequence_id": ("sequence", self._sequence_id), "depth": np.arange(len(depths))}
        coordinates["num_tokens"] = ("sequence", self._num_tokens)
        for key in ("stage", "layer", "recurrence"):
            coordinates[key] = ("depth", getattr(depths, key))
        return xr.Dataset({each.name: (("sequence", "depth"), self._value_SD, about)}, coordinates)


def _analysis(name: str) -> Analysis:
    each = MEASURES[name]
    title, definition = f"{each.title} of single sequences", f"{each.definition}; one sequence's mean"
    return Analysis(_PREFIX + name, title, each.needs, definition, partial(_SequencesFold, name), each.first)


ANALYSES = [_analysis(name) for name in SEQUENCE_MEASURES]


def sequences(store: str | Path | xr.Dataset) -> xr.Dataset:
    """A few measures over depth of up to sixteen single sequences, spread evenly over the store.

    Returns:
        Dataset: a variable [sequence, depth] for each of `SEQUENCE_MEASURES` that the captured quantities
        allow, float64, with its unit, title and definition: the sequence's own mean over tokens and heads,
        whose mean over all sequences `measure` gives. Coordinates sequence_id (row of the data) and
        num_tokens on sequence, stage, layer and recurrence on depth. Attribute `missing` (measure -> why it
        is absent).
    Raises:
        CannotTellError: none of the measures can be computed; the message says what to capture.
        NothingCapturedError: no sequence is finished yet.
    """
    return gathered(walk(store, ANALYSES))


def gathered(answers: Mapping[str, xr.Dataset | str]) -> xr.Dataset:
    """Returns what a walk found of single sequences, as `sequences` does."""
    return merged(answers, SEQUENCE_MEASURES, _PREFIX)


def long_table(found: xr.Dataset) -> pd.DataFrame:
    """Returns a table, a row per sequence and depth, a column per measure."""
    return found.to_dataframe().reset_index().drop(columns="sequence")
