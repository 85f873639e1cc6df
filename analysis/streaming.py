"""Walk a store sequence by sequence and fold what each one says, holding one unit in memory at a time.

Every number of the analysis is a mean over sequences of a mean over tokens, so that a long sequence weighs as
much as a short one and the band around a curve tells how much sequences differ.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xarray as xr

from ..capture.store.reading.reader import iter_units, open_store
from .state_rows import StateRows, StateWindow

BAND_Z = 1.96  # standard errors on either side of a mean: 95 % if the means of sequences are about normal


@dataclass(frozen=True)
class Depths:
    """The depth axis of a store: which block invocation each depth is, and where the core's lie."""

    stage: np.ndarray
    layer: np.ndarray
    recurrence: np.ndarray

    @cached_property
    def core_RL(self) -> np.ndarray:
        """Depth of every core block invocation, int [recurrences, layers]; empty for a feedforward model."""
        core = np.flatnonzero(self.recurrence >= 0)
        num_recurrences = int(self.recurrence.max(initial=-1)) + 1
        core_RL = core.reshape(num_recurrences, -1) if num_recurrences else core.reshape(0, 0)
        return core_RL[:, np.argsort(self.layer[core_RL[0]])] if num_recurrences else core_RL

    @cached_property
    def core(self) -> slice:
        """Depths of the core, which runs without a break and in the same order every time."""
        core = np.flatnonzero(self.recurrence >= 0)
        return slice(int(core[0]), int(core[-1]) + 1) if len(core) else slice(0)

    def __len__(self) -> int:
        return len(self.stage)


def as_dataset(store: str | Path | xr.Dataset) -> xr.Dataset:
    """A store's path, or a Dataset laid out like one, as a Dataset."""
    return store if isinstance(store, xr.Dataset) else open_store(store)


def depths_of(dataset: xr.Dataset) -> Depths:
    return Depths(*(dataset[name].values.astype(np.int64) for name in ("stage", "layer", "recurrence")))


class Arrays(dict[str, np.ndarray]):
    """The quantities of one sequence by name, each [token, depth, ...]; those that have one value for the
    whole sequence as if it had one token. And what analyses that come first have made of them for others.

    Attributes:
        states: of its kept tokens, read when asked for; None where the store keeps none.
    """

    def __init__(self, quantities: Mapping[str, np.ndarray], states: StateRows | None = None) -> None:
        super().__init__(quantities)
        self.states = states
        self._made: dict[str, np.ndarray] = {}

    def once(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """What `compute` gives, computed by the first that asks for this name."""
        if name not in self._made:
            self._made[name] = compute()
        return self._made[name]


def iter_sequences(dataset: xr.Dataset, names: Iterable[str]) -> Iterator[Arrays]:
    """The named quantities of one finished sequence after another; states need not be named."""
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
    """The same, with the next one read by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(next, units, None)
        while (unit := coming.result()) is not None:
            coming = reader.submit(next, units, None)
            yield unit


def _kept_spans(unit: xr.Dataset, owner: np.ndarray) -> list[tuple[int, int]]:
    """First and past-the-last row of `state`, in the whole store, of every sequence of a unit."""
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
    """First and past-the-last slot of every sequence in a unit; empty slots (-1) belong to none."""
    edges = np.flatnonzero(np.diff(token_sequence)) + 1
    starts, stops = [0, *edges], [*edges, len(token_sequence)]
    spans = zip(starts, stops, strict=True)
    return [(int(i), int(j)) for i, j in spans if j > i and token_sequence[i] >= 0]


def finite_mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean over the finite values in float64; NaN where there is none."""
    axes = (axis,) if isinstance(axis, int) else axis
    num_values = math.prod(values.shape[each] for each in axes)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean = _total(values, axes) / num_values
        if np.isfinite(mean).all():
            return mean
        finite = np.isfinite(values)
        return _total(np.where(finite, values, 0), axes) / _total(finite, axes)


def _total(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Sum in float64, an axis at a time from the first on: six times as fast as over several at once."""
    first, *more = sorted(axes)
    return values.sum(axis=first, dtype=np.float64).sum(axis=tuple(each - 1 for each in more))


class MeanFold:
    """Mean over sequences with its 95 % band, per depth or cell (Welford's update, so one pass is enough)."""

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        self.count = np.zeros(shape)
        self.mean = np.zeros(shape)
        self.squares = np.zeros(shape)

    def add(self, value: np.ndarray) -> None:
        finite = np.isfinite(value)
        if not finite.all():
            value = np.where(finite, value, self.mean)
        self.count += finite
        delta = value - self.mean
        change = delta / np.maximum(self.count, 1)
        self.mean += change
        delta *= np.subtract(value, self.mean, out=change)
        self.squares += delta

    def result(self) -> np.ndarray:
        """float64 [4, ...]: mean, low, high, number of sequences."""
        mean = np.where(self.count > 0, self.mean, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(self.squares / (self.count - 1) / self.count)
        error = np.where(self.count > 1, error, np.nan)
        return np.stack([mean, mean - BAND_Z * error, mean + BAND_Z * error, self.count])


class MaxFold:
    """Largest value over all sequences, per depth."""

    def __init__(self, num_depths: int) -> None:
        self.count = np.zeros(num_depths)
        self.largest = np.full(num_depths, -np.inf)

    def add(self, value_D: np.ndarray) -> None:
        finite = np.isfinite(value_D)
        self.count += finite
        self.largest = np.maximum(self.largest, np.where(finite, value_D, -np.inf))

    def result(self) -> np.ndarray:
        """float64 [4, depth]: largest, NaN, NaN, number of sequences."""
        largest = np.where(self.count > 0, self.largest, np.nan)
        none = np.full_like(largest, np.nan)
        return np.stack([largest, none, none, self.count])


class MedianFold:
    """Median and quartiles over all tokens, per depth: exact, or of more values than are kept from a
    histogram on a logarithmic axis.

    Its bins of 1/64 decade bound the error by 1.9 %, far finer than the decades that thresholds on distances
    are about. Values below `LOWEST` count as 0 there.
    """

    LOWEST, DECADES, BINS_PER_DECADE = 1e-12, 18, 64
    MOST_KEPT = 2**15  # values: 256 KiB, a few tokens of many depths or thousands of one

    def __init__(self, num_depths: int) -> None:
        self.num_bins = self.DECADES * self.BINS_PER_DECADE + 1  # bin 0 holds zeros
        self.count = np.zeros(num_depths)
        self.histogram = np.zeros((num_depths, self.num_bins), np.int64)
        self._kept: list[np.ndarray] = [np.empty((0, num_depths))]
        self._num_kept, self._keeps = 0, True

    def add(self, value_TD: np.ndarray) -> None:
        self.count += np.isfinite(value_TD).any(axis=0)
        self._kept.append(value_TD)
        self._num_kept += value_TD.size
        if self._keeps and self._num_kept <= self.MOST_KEPT:
            return
        self._keeps = False
        for each_TD in self._kept:
            self._count_in_bins(each_TD)
        self._kept.clear()

    def _count_in_bins(self, value_TD: np.ndarray) -> None:
        finite_TD = np.isfinite(value_TD)
        floor_TD = np.maximum(np.where(finite_TD, value_TD, 0), self.LOWEST * 0.5)
        bin_TD = np.floor(np.log10(floor_TD / self.LOWEST) * self.BINS_PER_DECADE).astype(np.int64) + 1
        bin_TD = np.clip(bin_TD, 0, self.num_bins - 1) + np.arange(value_TD.shape[1]) * self.num_bins
        self.histogram += np.bincount(bin_TD[finite_TD], minlength=self.histogram.size).reshape(
            self.histogram.shape
        )

    def result(self) -> np.ndarray:
        """float64 [4, depth]: median, lower quartile, upper quartile, number of sequences."""
        return np.stack([*(self._quantile(q) for q in (0.5, 0.25, 0.75)), self.count])

    def _quantile(self, share: float) -> np.ndarray:
        if self._keeps:
            return _finite_quantile(np.concatenate(self._kept), share)
        cumulative = self.histogram.cumsum(axis=1)
        rank = share * (cumulative[:, -1:] - 1)
        found = (cumulative > rank).argmax(axis=1)
        rows = np.arange(len(found))
        inside = self.histogram[rows, found]
        part = (rank[:, 0] - (cumulative[rows, found] - inside) + 0.5) / np.maximum(inside, 1)
        value = self.LOWEST * 10 ** ((found - 1 + np.clip(part, 0, 1)) / self.BINS_PER_DECADE)
        return np.where(cumulative[:, -1] > 0, np.where(found == 0, 0.0, value), np.nan)


def _finite_quantile(value_TD: np.ndarray, share: float) -> np.ndarray:
    """Quantile of the finite values of each column, linear between two; NaN where there is none."""
    found_D = np.full(value_TD.shape[1], np.nan)
    for depth, value_T in enumerate(value_TD.T):
        finite_F = value_T[np.isfinite(value_T)]
        if len(finite_F):
            found_D[depth] = np.quantile(finite_F, share)
    return found_D
