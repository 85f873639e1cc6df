"""Attention measures of every head over one sequence; curves over depth are means of these over heads.

Each is computed once a sequence, for all analyses of a walk.
"""

from collections.abc import Iterator

import numpy as np

from .depth_axis import Depths, Places
from .folds import finite_mean
from .streaming import Arrays

_BLOCK_BYTES = 2**25  # float64 workspace of the column sums, so that a long sequence does not multiply memory


def mean(arrays: Arrays, quantity: str) -> np.ndarray:
    """Mean over tokens of a quantity, float64 [depth, head]."""
    return arrays.once(f"{quantity} by head", lambda: finite_mean(arrays[quantity], 0))


def concentration(arrays: Arrays) -> np.ndarray:
    """ColSum concentration: 0 where all keys receive alike, 1 where one receives everything.

    Returns:
        float64 [depth, head]: 1 + sum c ln c / ln T over the share c that each of the T keys receives; NaN
        for a sequence of one token, whose key takes everything.
    Source: arXiv 2604.11791, section 4.3.
    """
    return arrays.once("concentration by head", lambda: _concentration(arrays["attention_received"]))


def entropy_change(arrays: Arrays, depths: Depths) -> np.ndarray:
    """Mean over queries of the absolute change of a row's entropy since the recurrence before.

    Returns:
        float64 [depth, head], nat; NaN outside the core and at the first recurrence.
    """

    def compute() -> np.ndarray:
        entropy_TDH = arrays["attention_entropy"]
        change_DH = np.full(entropy_TDH.shape[1:], np.nan)
        for later, change_TCH in changes(entropy_TDH, depths):
            change_DH[later] = finite_mean(change_TCH, 0)
        return change_DH

    return arrays.once("entropy change by head", compute)


def changes(values_TDH: np.ndarray, depths: Depths) -> Iterator[tuple[Places, np.ndarray]]:
    """Absolute change of the values since the recurrence before, loop by loop.

    Yields:
        depths from the loop's second recurrence on, and the change there, [token, depth, head].
    """
    for later, earlier in depths.steps:
        change_TCH = values_TDH[:, later] - values_TDH[:, earlier]
        yield later, np.abs(change_TCH, out=change_TCH)


def _concentration(received_TDH: np.ndarray) -> np.ndarray:
    T, D, H = received_TDH.shape
    concentration_DH = np.full((D, H), np.nan)
    if T == 1:
        return concentration_DH
    block = max(1, _BLOCK_BYTES // (8 * T * H))
    for start in range(0, D, block):
        share_TDH = received_TDH[:, start : start + block].astype(np.float64) / T
        log_TDH = np.log(share_TDH, out=np.zeros_like(share_TDH), where=share_TDH > 0)
        concentration_DH[start : start + block] = 1 + (share_TDH * log_TDH).sum(axis=0) / np.log(T)
    return concentration_DH
