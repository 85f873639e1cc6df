"""One token's path through the loop, in the plane that shows it as wide as a plane can.

It takes one row of `state`, which is read when the answer is asked for, and no walk over the sequences.

Source: arXiv 2604.11791, section 4.1, figure 5.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from ...errors import CannotTellError
from ..depth_axis import Depths
from ..kept_states import core_states, last_rows, position_of, row_of
from ..state_rows import decoded
from ..streaming import Arrays
from ..walk import Analysis, answer

_TINY = np.finfo(float).tiny  # keeps 0 / 0 at 0


class _Path:
    def __init__(self, sequence_id: int | None, components: int, dataset: xr.Dataset, depths: Depths) -> None:
        self._places, self._depth = core_states(dataset, depths)
        rows = last_rows(dataset)
        self._sequence = next(iter(rows)) if sequence_id is None else sequence_id
        self._row = row_of(rows, self._sequence)
        self._dataset, self._depths, self._components = dataset, depths, components

    def add(self, arrays: Arrays) -> None:
        raise AssertionError("it needs no quantity")

    def result(self) -> xr.Dataset:
        state = self._dataset["state"]
        x_PD = decoded(state.isel({state.dims[0]: self._row, "depth_state": self._places})).astype(np.float64)
        finite = np.isfinite(x_PD).all(axis=1)
        if finite.sum() < 2:
            raise CannotTellError(
                f"the states of sequence {self._sequence} are not finite: there is no path to draw"
            )
        x_PD, depth = x_PD[finite], self._depth[finite]
        u_PK, scale_K, _ = np.linalg.svd(x_PD - x_PD.mean(axis=0), full_matrices=False)
        position_PK = (u_PK * scale_K)[:, : self._components]
        # a sign is arbitrary: the path ends on the positive side
        position_PK *= np.where(position_PK[-1] < 0, -1, 1)
        explained_K = scale_K**2 / max((scale_K**2).sum(), _TINY)
        return xr.Dataset(
            {
                "position": (("point", "component"), position_PK, {"units": "residual units"}),
                "explained": ("component", explained_K[: self._components], {"units": "share of variance"}),
            },
            {
                "depth": ("point", depth),
                "layer": ("point", self._depths.layer[depth]),
                "recurrence": ("point", self._depths.recurrence[depth]),
            },
            {
                "sequence_id": self._sequence,
                "token_position": position_of(self._dataset, self._row),
                "num_points": len(depth),
                "non_finite": int((~finite).sum()),
            },
        )


def _tables(found: xr.Dataset) -> dict[str, pd.DataFrame]:
    """Returns one table, a row per point and component."""
    table = found["position"].to_dataframe().reset_index()
    table["explained"] = found["explained"].values[table["component"]]
    return {"trajectory": table}


def _analysis(sequence_id: int | None, components: int) -> Analysis:
    return Analysis(
        "trajectory",
        "Trajectory",
        (),
        "the last kept token of one sequence, at every kept depth of the loop, on the principal "
        "components of its own residuals there",
        partial(_Path, sequence_id, components),
        tables=_tables,
    )


ANALYSES = [_analysis(None, 3)]


def trajectory(
    store: str | Path | xr.Dataset, sequence_id: int | None = None, components: int = 3
) -> xr.Dataset:
    """Principal components of one token's residuals over every kept core depth.

    Args:
        store: path of a store, or a Dataset laid out like one.
        sequence_id: the sequence, by its row in the data; the first with a kept state if left out. Its last
            kept token is shown.
        components: how many principal components.
    Returns:
        Dataset: `position` [point, component] in residual units, `explained` [component] (share of the
            variance), with coordinates depth, layer and recurrence on point; attributes `sequence_id`,
            `token_position`, `num_points`, `non_finite`.
    Raises:
        CannotTellError: no core states, or none of that sequence, are kept.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _analysis(sequence_id, components))
