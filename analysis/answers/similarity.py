"""How alike any two block invocations are: maps over all pairs of depths, and what they say of the loop.

A loop that has settled shows as a map of repeating blocks: a layer is like itself in every recurrence, and
unlike the layers around it. Two curves beside each map put that in numbers.

Source: arXiv 2604.11791, section 4.1 and its figures of attention similarity.
"""

from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from ...capture.store.quantities import QUANTITIES
from ...errors import CannotTellError
from ..depth_axis import Depths
from ..folds import STATISTICS, MeanFold
from ..streaming import Arrays
from ..walk import Analysis, answer


class _PairsFold:
    def __init__(self, name: str, dataset: xr.Dataset, depths: Depths) -> None:
        self._name, self._depths = name, depths
        D, L = len(depths), sum(loop_RL.shape[1] for loop_RL in depths.loops)
        self._map = MeanFold((D, D))
        self._same_layer, self._other_layers = MeanFold(L), MeanFold(L)
        self._bad = 0

    def add(self, arrays: Arrays) -> None:
        (value_DD,) = arrays[self._name]
        self._bad += value_DD.size - int(np.isfinite(value_DD).sum())
        self._map.add(value_DD)
        if self._depths.loops:
            pairs = zip(
                *(across_and_within(value_DD, loop_RL) for loop_RL in self._depths.loops), strict=True
            )
            same_L, other_L = map(np.concatenate, pairs)
            self._same_layer.add(same_L)
            self._other_layers.add(other_L)

    def result(self) -> xr.Dataset:
        if not self._map.count.any():
            raise CannotTellError(f"no finished sequence has a finite {self._name}")
        about = {"units": QUANTITIES[self._name].unit}
        by_layer = ("statistic", "layer_of_core")
        layer = np.arange(len(self._same_layer.count))
        coordinates = {"statistic": list(STATISTICS), "layer_of_core": layer}
        for axis, ending in (("depth", ""), ("depth_other", "_other")):
            coordinates[axis] = np.arange(len(self._depths))
            for name in ("stage", "layer", "recurrence"):
                coordinates[name + ending] = (axis, getattr(self._depths, name))
        return xr.Dataset(
            {
                self._name: (("statistic", "depth", "depth_other"), self._map.result(), about),
                "same_layer": (by_layer, self._same_layer.result(), about),
                "other_layers": (by_layer, self._other_layers.result(), about),
            },
            coordinates,
            {"non_finite": self._bad},
        )


def across_and_within(value_DD: np.ndarray, loop_RL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A layer against itself at other recurrences, and against the other layers of the same recurrence.

    Returns:
        the means of both over all such pairs, each float64 [layer]; NaN where there is no pair, or one of the
        pairs is not finite.
    """
    R, L = loop_RL.shape
    same_L, other_L = np.full((2, L), np.nan)
    depth_C = loop_RL.ravel()
    value_RLRL = value_DD[np.ix_(depth_C, depth_C)].astype(np.float64).reshape(R, L, R, L)
    itself_L = np.einsum("rlrl->l", value_RLRL)
    if R > 1:
        same_L = (np.einsum("rlsl->l", value_RLRL) - itself_L) / (R * (R - 1))
    if L > 1:
        other_L = (np.einsum("rlrm->l", value_RLRL) - itself_L) / (R * (L - 1))
    return same_L, other_L


def _of(name: str, title: str) -> Analysis:
    definition = (
        f"{QUANTITIES[name].definition}; mean over sequences with a 95 % band. same_layer: mean over a core "
        "layer's pairs of different recurrences; other_layers: over its pairs with the core's other layers "
        "in the same recurrence"
    )
    return Analysis(name, title, (name,), definition, partial(_PairsFold, name))


_RESIDUALS = _of("residual_similarity", "Residuals of all pairs of blocks")
_ATTENTION = _of("attention_distance", "Attention of all pairs of blocks")
ANALYSES = [_RESIDUALS, _ATTENTION]


def residual_similarity(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Cosine of the residuals of all pairs of block invocations.

    Returns:
        Dataset: `residual_similarity` [statistic, depth, depth_other], with coordinates stage, layer and
        recurrence on depth, the same with `_other` on depth_other; `same_layer` and `other_layers`
        [statistic, layer_of_core], which counts the layers of all loops, one loop after another. Attribute
        `non_finite` (pairs of sequences left out of the map). NaN where a layer has no such pair; a
        feedforward model has a map alone.
    Raises:
        CannotTellError: there is none, and the message says what to capture.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _RESIDUALS)


def attention_distance(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Frobenius distance of attention, mean over heads, of all pairs of block invocations.

    Returns, Raises: as `residual_similarity`, with `attention_distance` for the map.
    """
    return answer(store, _ATTENTION)
