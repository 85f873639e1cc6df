"""The sequences of a store, one after another, holding one unit in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xarray as xr

from ..capture.store.reading.reader import iter_units, open_store
from .state_rows import StateRows, StateWindow


def as_dataset(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Opens a store's path; returns a Dataset laid out like a store as it is."""
    return store if isinstance(store, xr.Dataset) else open_store(store)


class Arrays(dict[str, np.ndarray]):
    """The quantities of one sequence by name, each [token, depth, ...]; those that have one value for the
    whole sequence as if it had one token. Analyses that come first leave here what they have made of them for
    others.

    Attributes:
        states: states of its kept tokens, read when asked for; None where the store keeps none.
    """

    def __init__(self, quantities: Mapping[str, np.ndarray], states: StateRows | None = None) -> None:
        super().__init__(quantities)
        self.states = states
        self._made: dict[str, np.ndarray] = {}

    def once(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns what `compute` gives, computed when this name is first asked for."""
        if name not in self._made:
            self._made[name] = compute()
        return self._made[name]


def iter_sequences(dataset: xr.Dataset, names: Iterable[str]) -> Iterator[Arrays]:
    """Yields the named quantities of one finished sequence after another; states need not be named."""
    names, state = [name for name in names if name != "state"], dataset.get("state")
    for unit in _one_ahead(iter_units(dataset, names)):
        owner = unit["token_sequence"].values
        kept = _kept_spans(unit, owner) if state is not None else []
        window = None if state is None else StateWindow(state, max((stop for _, stop in kept), default=0))
        arrays = {name: unit[name].values for name in names}
        of_sequence = {name for name in names if unit[name].dims[0] == "sequence"}
        for index, (start, stop) in enumerate(sequence_spans(owner)):
            tokens, itself = slice(start, stop), slice(index, index + 1)
            here = {name: array[itself if name in of_sequence else tokens] for name, array in arrays.items()}
            yield Arrays(here, None if window is None else StateRows(window, slice(*kept[index])))


def _one_ahead(units: Iterator[xr.Dataset]) -> Iterator[xr.Dataset]:
    """Yields the same sequences, with the next one read by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(next, units, None)
        while (unit := coming.result()) is not None:
            coming = reader.submit(next, units, None)
            yield unit


def _kept_spans(unit: xr.Dataset, owner: np.ndarray) -> list[tuple[int, int]]:
    """Returns the first and past-the-last row of `state`, in the whole store, of every sequence of a unit."""
    number = unit.attrs["unit"]
    if "state_token" not in unit.coords:  # every token is kept
        start = number * len(owner)
        return [(start + first, start + stop) for first, stop in sequence_spans(owner)]
    slot = unit["state_token"].values
    start = number * len(slot)
    used = slot[slot >= 0] % len(owner)  # a unit's slots start at a multiple of its size
    return [
        (start + int(np.searchsorted(used, first)), start + int(np.searchsorted(used, stop)))
        for first, stop in sequence_spans(owner)
    ]


def sequence_spans(token_sequence: np.ndarray) -> list[tuple[int, int]]:
    """Returns first and past-the-last slot of every sequence in a unit; empty slots (-1) belong to none."""
    edges = np.flatnonzero(np.diff(token_sequence)) + 1
    starts, stops = [0, *edges], [*edges, len(token_sequence)]
    spans = zip(starts, stops, strict=True)
    return [(int(i), int(j)) for i, j in spans if j > i and token_sequence[i] >= 0]
