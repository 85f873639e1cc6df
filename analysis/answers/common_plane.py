"""Paths of several tokens through the loop in one plane: that of all kept core states of a store.

A token's own plane (`trajectory.py`, figure 5) shows its path as wide as a plane can, and no two tokens
share it. Here all do, so that it shows whether they come to the same points. Mean and scatter of the states
are put together a block at a time, in float64, and the axes are eigenvectors of what comes out: exact, in a
few matrices of 8 D² bytes (D the states' width; 128 MiB at 4096), however large the store is. It takes D²
multiply-adds a state, on one core 0.02 ms at 576 and 1.8 ms at 4096, a hundred times what reading one does.
So of a store that would take more than about 2 s every n-th kept token is used, spread evenly over it.
The eigenvectors take 0.1 s at 576, 6 s at 2048 and 32 s at 4096, once.

Source: arXiv 2604.11791, section 4.1, figure 5, which has one token alone: the common plane is ours.
Merging blocks: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances, 1979.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from ...errors import CannotTellError
from ..depth_axis import Depths
from ..kept_states import core_states, last_rows, num_kept, position_of, row_of
from ..state_rows import decoded
from ..streaming import Arrays
from ..walk import Analysis, answer

MOST_PATHS = 8
_BLOCK_BYTES = 2**25  # float64 of the states that are merged at once: few passes over the matrix
_MOST_PRODUCTS = 4 * 10**10  # multiply-adds of the scatter matrix: about 2 s of one core


class Scatter:
    """Mean and scatter matrix Σ (x − mean)(x − mean)ᵀ of vectors that come one after another, in float64.

    What comes is not held: memory is two matrices and a block of vectors.
    """

    def __init__(self, width: int) -> None:
        self.count, self.mean_D, self.scatter_DD = 0, np.zeros(width), np.zeros((width, width))
        self._block_BD = np.empty((max(1, _BLOCK_BYTES // (8 * width)), width))
        self._filled = 0

    def add(self, x_PD: np.ndarray) -> None:
        """Takes in finite vectors of any float dtype."""
        while len(x_PD):
            taken, x_PD = np.split(x_PD, [len(self._block_BD) - self._filled])
            self._block_BD[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if self._filled == len(self._block_BD):
                self.merge()

    def merge(self) -> None:
        """Brings count, mean and scatter up to date with all that was added."""
        x_BD, self._filled = self._block_BD[: self._filled], 0
        if not len(x_BD):
            return
        total = self.count + len(x_BD)
        mean_D = x_BD.mean(axis=0)
        x_BD -= mean_D
        apart_D = mean_D - self.mean_D
        self.scatter_DD += x_BD.T @ x_BD
        self.scatter_DD += np.multiply.outer(apart_D, apart_D * (self.count * len(x_BD) / total))
        self.mean_D += apart_D * (len(x_BD) / total)
        self.count = total


class _PlaneFold:
    def __init__(
        self, sequence_ids: Sequence[int] | None, components: int, dataset: xr.Dataset, depths: Depths
    ) -> None:
        self._places, self._depth = core_states(dataset, depths)
        rows = last_rows(dataset)
        chosen = list(rows)[:MOST_PATHS] if sequence_ids is None else sequence_ids
        self._rows = {each: row_of(rows, each) for each in chosen}
        self._dataset, self._depths = dataset, depths
        self._components, self._bad = components, 0
        D, num_tokens = dataset.sizes["hidden"], num_kept(dataset)
        self._every = -(-num_tokens * len(self._places) * D**2 // _MOST_PRODUCTS)
        self._place, self._scatter = 0, Scatter(D)

    def add(self, arrays: Arrays) -> None:
        assert arrays.states is not None  # the analysis is asked for only if states are kept
        for x_TKD in arrays.states.blocks(self._places, self._every, -self._place % self._every):
            x_PD = x_TKD.reshape(-1, x_TKD.shape[-1])
            finite_P = np.isfinite(x_PD).all(axis=1)
            self._bad += int((~finite_P).sum())
            self._scatter.add(x_PD[finite_P])
        self._place += len(arrays.states)

    def result(self) -> xr.Dataset:
        self._scatter.merge()
        if self._scatter.count < 2:
            raise CannotTellError(f"{self._scatter.count} kept core states are finite: they span no plane")
        mean_D = self._scatter.mean_D
        axis_KD, explained_K = _principal(self._scatter.scatter_DD, self._components)
        position_SPK = np.stack([(self._path(row) - mean_D) @ axis_KD.T for row in self._rows.values()])
        sign_K = _signs(position_SPK[0])
        position_SPK, axis_KD, depth = position_SPK * sign_K, axis_KD * sign_K[:, None], self._depth
        return xr.Dataset(
            {
                "position": (("path", "point", "component"), position_SPK, {"units": "residual units"}),
                "explained": ("component", explained_K, {"units": "share of variance"}),
                "axis": (("component", "hidden"), axis_KD, {"units": "of length 1"}),
                "mean": ("hidden", mean_D, {"units": "residual units"}),
            },
            {
                "sequence_id": ("path", list(self._rows)),
                "token_position": ("path", [position_of(self._dataset, row) for row in self._rows.values()]),
                "depth": ("point", depth),
                "layer": ("point", self._depths.layer[depth]),
                "recurrence": ("point", self._depths.recurrence[depth]),
            },
            {"num_states": self._scatter.count, "every": self._every, "non_finite": self._bad},
        )

    def _path(self, row: int) -> np.ndarray:
        """Returns the kept core states of one row, float64 [point, hidden]; NaN where one is not finite."""
        state = self._dataset["state"]
        x_PD = decoded(state.isel({state.dims[0]: row, "depth_state": self._places})).astype(np.float64)
        return np.where(np.isfinite(x_PD).all(axis=1, keepdims=True), x_PD, np.nan)


def _principal(scatter_DD: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the leading axes [component, hidden], and the share of the variance along each."""
    value_D, vector_DD = np.linalg.eigh(scatter_DD)  # ascending
    leading = slice(None, -components - 1, -1)
    share_K = np.maximum(value_D[leading], 0) / max(np.trace(scatter_DD), np.finfo(float).tiny)
    return vector_DD[:, leading].T, share_K


def _signs(position_PK: np.ndarray) -> np.ndarray:
    """Returns signs of the axes, ±1, that let the first path end on the positive side, as in `trajectory`."""
    finite = np.flatnonzero(np.isfinite(position_PK).all(axis=1))
    return np.where(position_PK[finite[-1]] < 0, -1.0, 1.0) if len(finite) else np.ones(position_PK.shape[1])


def _analysis(sequence_ids: Sequence[int] | None, components: int) -> Analysis:
    return Analysis(
        "trajectories",
        "Paths in the plane of all states",
        ("state",),
        "the last kept token of several sequences, at every kept core depth, on the principal components of "
        "all kept core states of the store, or of every n-th token's where there are too many (mean and "
        "covariance in float64)",
        partial(_PlaneFold, sequence_ids, components),
        first=0,
    )


ANALYSES = [_analysis(None, 3)]


def trajectories(
    store: str | Path | xr.Dataset, sequence_ids: Sequence[int] | None = None, components: int = 3
) -> xr.Dataset:
    """Paths of several tokens on the principal components of all kept core states of a store.

    Args:
        store: path of a store, or a Dataset laid out like one.
        sequence_ids: sequences by their row in the data, of each the last kept token; the first
            `MOST_PATHS` with kept states if left out.
        components: how many principal components; as many as there are dimensions at most.
    Returns:
        Dataset: `position` [path, point, component] in residual units, NaN where a state is not finite;
        `explained` [component] (share of the variance of all states); `axis` [component, hidden] and `mean`
        [hidden], which put any other state into the plane: (x − mean) · axis. Coordinates sequence_id and
        token_position on path, depth, layer and recurrence on point; attributes `num_states` (that the
        plane was fitted to), `every` (1, or of which n-th kept tokens these are) and `non_finite` (states
        that were left out).
    Raises:
        CannotTellError: no core states, or none of such a sequence, are kept.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _analysis(sequence_ids, components))
