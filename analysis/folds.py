"""Folds put values of one sequence after another together, without holding them.

Every number of the analysis is a mean over sequences of a mean over tokens, so that a long sequence weighs as
much as a short one and the band around a curve tells how much sequences differ.
"""

import math

import numpy as np

STATISTICS = ("value", "low", "high", "sequences")  # what a fold's result holds, in this order
BAND_Z = 1.96  # standard errors on either side of a mean: 95 % if the means of sequences are about normal


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


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient in float64; infinite or NaN where what is below is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below, dtype=np.float64)


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

    Bins of 1/64 decade bound the error by 1.9 %, far finer than the decades that thresholds on distances are
    about.

    Args:
        num_depths: values at a time.
        lowest: lower end of the histogram; values below it count as 0 there.
        decades: how far it reaches.
        bins_per_decade: how fine it is.
    """

    MOST_KEPT = 2**15  # values: 256 KiB, a few tokens of many depths or thousands of one

    def __init__(
        self, num_depths: int, *, lowest: float = 1e-12, decades: int = 18, bins_per_decade: int = 64
    ) -> None:
        self._lowest, self._bins_per_decade = lowest, bins_per_decade
        self.num_bins = decades * bins_per_decade + 1  # bin 0 holds zeros
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
        floor_TD = np.maximum(np.where(finite_TD, value_TD, 0), self._lowest * 0.5)
        bin_TD = np.floor(np.log10(floor_TD / self._lowest) * self._bins_per_decade).astype(np.int64) + 1
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
        value = self._lowest * 10 ** ((found - 1 + np.clip(part, 0, 1)) / self._bins_per_decade)
        return np.where(cumulative[:, -1] > 0, np.where(found == 0, 0.0, value), np.nan)


def _finite_quantile(value_TD: np.ndarray, share: float) -> np.ndarray:
    """Quantile of the finite values of each column, linear between two; NaN where there is none."""
    found_D = np.full(value_TD.shape[1], np.nan)
    for depth, value_T in enumerate(value_TD.T):
        finite_F = value_T[np.isfinite(value_T)]
        if len(finite_F):
            found_D[depth] = np.quantile(finite_F, share)
    return found_D
