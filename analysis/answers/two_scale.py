"""Two scales of the loop: the way through the blocks of a recurrence, and what is left of it as a step.

A loop at its cyclic fixed point walks a long way within every recurrence and ends where it began; how much of
the way is left as a step is the ratio of the scales. How steps bend, by the angle and the difference of two
successive ones (the acceleration, which stops the loop early in the source), takes the states themselves:
norms and cosines of states do not tell it.

Source: Pappone, Crisostomi, Rodolà, Two-Scale Latent Dynamics for Recurrent-Depth Transformers, arXiv
2509.23314, whose models loop one block at a time. Here a step is a block's residual against its own one
recurrence earlier, as there; the larger scale is the way through the blocks, which is our reading for a core
of several.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
import xarray as xr

from ...errors import CannotTellError
from ..depth_axis import Depths
from ..folds import STATISTICS, MeanFold, finite_mean, ratio
from ..streaming import Arrays
from ..walk import Analysis, answer

_BLOCK_BYTES = 2**21  # float64 of one block of tokens, of which a few copies stay in the cache


class _ByDepth:
    """Curves over depth, each the mean over sequences with its band."""

    def __init__(self, dataset: xr.Dataset, units: dict[str, str]) -> None:
        self._coordinates = {
            name: dataset[name].variable for name in ("depth", "stage", "layer", "recurrence")
        }
        self._units = units
        self._folds = {name: MeanFold(dataset.sizes["depth"]) for name in units}

    def add(self, curves: dict[str, np.ndarray]) -> None:
        for name, curve_D in curves.items():
            self._folds[name].add(curve_D)

    def result(self, **attributes) -> xr.Dataset:
        curves = {
            name: (("statistic", "depth"), fold.result(), {"units": self._units[name]})
            for name, fold in self._folds.items()
        }
        return xr.Dataset(curves, self._coordinates | {"statistic": list(STATISTICS)}, attributes)


class _TwoScaleFold:
    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        self._depths = depths
        units = {"path": "residual units", "step": "residual units", "ratio": "share of the path"}
        units |= {"block_ratio": "share of the update", "step_change": "residual units"}
        self._curves = _ByDepth(dataset, units)

    def add(self, arrays: Arrays) -> None:
        path_D, step_D, ratio_D, block_D, change_D = np.full((5, len(self._depths)), np.nan)
        for loop_RL in self._depths.loops:
            path_TR, step_TR = np.zeros(1), np.zeros(1)
            # a layer at a time, so that a long sequence takes little memory; the last one's steps stay
            for depth_R in loop_RL.T:
                step_TR, update_TR = (arrays[name][:, depth_R] for name in ("step_norm", "update_norm"))
                path_TR = path_TR + update_TR.astype(np.float64)
                block_D[depth_R] = finite_mean(ratio(step_TR, update_TR), 0)
                change_D[depth_R[1:]] = finite_mean(np.abs(np.diff(step_TR, axis=1)), 0)
            end_R = loop_RL[:, -1]
            path_D[end_R], step_D[end_R] = finite_mean(path_TR, 0), finite_mean(step_TR, 0)
            ratio_D[end_R] = finite_mean(ratio(step_TR, path_TR), 0)
        curves = {"path": path_D, "step": step_D, "ratio": ratio_D}
        self._curves.add(curves | {"block_ratio": block_D, "step_change": change_D})

    def result(self) -> xr.Dataset:
        return self._curves.result()


class _AccelerationFold:
    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        kept = {int(depth): place for place, depth in enumerate(dataset["state_depth"].values)}
        runs = [run for loop_RL in depths.loops for layer_R in loop_RL.T for run in _kept_runs(layer_R, kept)]
        self._runs = [(run[2:], np.array([kept[depth] for depth in run])) for run in runs]
        if not self._runs:
            raise CannotTellError(
                "no core layer's state is kept for three successive recurrences: capture again with at least "
                "3 recurrences and --quantities all,state --states core"
            )
        self._num_depths, self._num_tokens, self._bad = len(depths), 0, 0
        units = {"acceleration": "residual units", "relative_acceleration": "share of the norm"}
        self._curves = _ByDepth(dataset, units | {"step_turn": "cosine"})

    def add(self, arrays: Arrays) -> None:
        assert arrays.states is not None  # the analysis is asked for only if states are kept
        T, _, D = arrays.states.shape
        if T == 0:
            return
        curves_3TD, done = np.full((3, T, self._num_depths), np.nan), 0
        few = max(1, _BLOCK_BYTES // (8 * D * max(len(places) for _, places in self._runs)))
        for block_TKD in arrays.states.blocks():
            for start in range(0, len(block_TKD), few):
                x_TKD = block_TKD[start : start + few]
                rows = slice(done + start, done + start + len(x_TKD))
                for run, places in self._runs:
                    curves_3TD[:, rows, run] = accelerations(x_TKD[:, places])
            done += len(block_TKD)
        self._num_tokens += T
        due = T * sum(len(run) for run, _ in self._runs)
        self._bad += due - int(np.isfinite(curves_3TD[0]).sum())
        names = ("acceleration", "relative_acceleration", "step_turn")
        self._curves.add(dict(zip(names, finite_mean(curves_3TD, 1), strict=True)))

    def result(self) -> xr.Dataset:
        if not self._num_tokens:
            raise CannotTellError("no kept token of a finished unit: there is nothing to follow")
        return self._curves.result(num_tokens=self._num_tokens, non_finite=self._bad)


def _kept_runs(layer_R: np.ndarray, kept: Mapping[int, int]) -> list[list[int]]:
    """Returns the depths of a layer that are kept at three or more successive recurrences."""
    groups = groupby(layer_R.tolist(), key=lambda depth: depth in kept)
    runs = [list(run) for is_kept, run in groups if is_kept]
    return [run for run in runs if len(run) > 2]


def accelerations(x_TRD: np.ndarray) -> np.ndarray:
    """Length of the difference of two steps, that over the third state's norm, and the steps' cosine.

    Args:
        x_TRD: a layer's states at successive recurrences, [token, recurrence, hidden].
    Returns:
        float64 [3, token, recurrence - 2]; the cosine is NaN where a step is 0.
    """
    x_TRD = x_TRD.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        step_TRD = np.diff(x_TRD, axis=1)
        length_TR = _norms(np.diff(step_TRD, axis=1))
        relative_TR = length_TR / _norms(x_TRD[:, 2:])
        step_TR = _norms(step_TRD)
        product_TR = np.einsum("trd,trd->tr", step_TRD[:, 1:], step_TRD[:, :-1])
        turn_TR = product_TR / (step_TR[:, 1:] * step_TR[:, :-1])
    return np.stack([length_TR, relative_TR, turn_TR])


def _norms(x_TRD: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("trd,trd->tr", x_TRD, x_TRD))


_TWO_SCALE = Analysis(
    "two_scale",
    "Two scales of the loop",
    ("step_norm", "update_norm"),
    "path: sum of the core blocks' updates within a recurrence; step: how far the last core layer's residual "
    "is from its own one recurrence earlier; ratio: step over path (Pappone et al., arXiv 2509.23314; for a "
    "core of several blocks our reading)",
    _TwoScaleFold,
    first=1,
)
_ACCELERATION = Analysis(
    "acceleration",
    "How steps bend",
    ("state",),
    "length of the difference of a layer's step and the step before, over the residual's norm where "
    "relative, and the cosine of the two steps (Pappone et al., arXiv 2509.23314); mean over kept tokens",
    _AccelerationFold,
    first=1,
)
ANALYSES = [_TWO_SCALE, _ACCELERATION]


def two_scale(store: str | Path | xr.Dataset) -> xr.Dataset:
    """The way within a recurrence against the step between recurrences, [statistic, depth].

    Returns:
        Dataset: `path` (sum of update norms over the core's blocks), `step` (of the last core layer) and
        `ratio`, where each recurrence ends; `block_ratio`, each block's step over its update; `step_change`,
        the absolute difference of a layer's step and its step before, which the acceleration cannot be less
        than. Without injection and end-of-recurrence rule the path's updates add up to the step, and the
        ratio is at most 1. Means over tokens, then over sequences with a 95 % band.
    Raises:
        CannotTellError: there is none, and the message says what to capture.
    """
    return answer(store, _TWO_SCALE)


def acceleration(store: str | Path | xr.Dataset) -> xr.Dataset:
    """How each step differs from the one before, at depths of kept states, [statistic, depth].

    Returns:
        Dataset: `acceleration` ‖(x_t − x_t−1) − (x_t−1 − x_t−2)‖, `relative_acceleration` (over ‖x_t‖) and
        `step_turn` (cosine of the two steps), means over kept tokens, then over sequences with a 95 % band;
        attributes `num_tokens` and `non_finite` (values left out).
    Raises:
        CannotTellError: no layer's state is kept three times in a row; the message says what to capture.
    """
    return answer(store, _ACCELERATION)
