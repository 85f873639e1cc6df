"""Finds the kept states of a store: the depths and the tokens that they are of."""

import numpy as np
import xarray as xr

from ..errors import CannotTellError
from .depth_axis import Depths


def core_states(dataset: xr.Dataset, depths: Depths) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of all loops' kept states on `depth_state`, and their depths.

    Raises:
        CannotTellError: fewer than two are kept.
    """
    kept = kept_depths(dataset, depths)
    core = np.flatnonzero(depths.recurrence[kept] >= 0)
    if len(core) < 2:
        raise CannotTellError(advice(depths, f"states of {len(core)} core depths are kept", "core"))
    return core, kept[core]


def last_rows(dataset: xr.Dataset) -> dict[int, int]:
    """Returns the row of `state` of each sequence's last kept token, by sequence id, in the order of ids.

    Raises:
        CannotTellError: no token with a kept state is captured yet.
    """
    owner = dataset["token_sequence"].values
    if "state_token" in dataset.coords:
        slot = dataset["state_token"].values
        owner = np.where(slot >= 0, owner[slot], -1)
    rows = np.flatnonzero(owner >= 0)
    if not len(rows):
        raise CannotTellError("no token with a kept state is captured yet: run the capture command again")
    ids = dataset["sequence_id"].values[owner[rows]]
    found, from_end = np.unique(ids[::-1], return_index=True)
    return dict(zip(found.tolist(), rows[::-1][from_end].tolist(), strict=True))


def num_kept(dataset: xr.Dataset) -> int:
    """Returns the number of tokens in finished units whose states are kept."""
    owner = dataset["token_sequence"].values
    if "state_token" in dataset.coords:
        slot = dataset["state_token"].values
        return int((owner[slot[slot >= 0]] >= 0).sum())
    return int((owner >= 0).sum())


def position_of(dataset: xr.Dataset, row: int) -> int:
    """Returns the place in its sequence of the token that a row of `state` is of."""
    slot = int(dataset["state_token"][row]) if "state_token" in dataset.coords else row
    return int(dataset["token_position"][slot])


def row_of(rows: dict[int, int], sequence: int) -> int:
    """Returns a sequence's row among `last_rows`. Raises CannotTellError if none of it is kept."""
    if sequence not in rows:
        raise CannotTellError(f"no state of sequence {sequence} is kept; kept are {_some(list(rows))}")
    return rows[sequence]


def kept_depths(dataset: xr.Dataset, depths: Depths) -> np.ndarray:
    """Returns the depth of each place on `depth_state`, int64. Raises CannotTellError without kept states."""
    if "state" not in dataset:
        raise CannotTellError(advice(depths, "no states are kept", "core"))
    return dataset["state_depth"].values.astype(np.int64)


def advice(depths: Depths, kept: str, states: str) -> str:
    """Says why the kept states do not do, and which --states would; or that there is no loop."""
    if not depths.loops:
        return "the model has no loop"
    return f"{kept}: capture again with --quantities all,state --states {states}"


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
