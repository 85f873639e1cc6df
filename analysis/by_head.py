"""What the attention of one sequence says of every head; curves over depth are means of these over heads."""

from itertools import pairwise

import numpy as np

from .streaming import finite_mean

_BLOCK_BYTES = 2**25  # float64 workspace of the column sums, so that a long sequence does not multiply memory


def concentration(received_TDH: np.ndarray) -> np.ndarray:
    """ColSum concentration: 0 where all keys receive alike, 1 where one receives everything.

    Args:
        received_TDH: attention that each key receives, summed over the queries of its sequence.
    Returns:
        float64 [depth, head]: 1 + sum c ln c / ln T over the share c that each of the T keys receives; NaN
        for a sequence of one token, whose key takes everything.
    Source: arXiv 2604.11791, section 4.3.
    """
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


def entropy_change(entropy_TDH: np.ndarray, core_RL: np.ndarray) -> np.ndarray:
    """Mean over queries of the absolute change of a row's entropy since the recurrence before.

    Returns:
        float64 [depth, head], nat; NaN outside the core and at the first recurrence.
    """
    change_DH = np.full(entropy_TDH.shape[1:], np.nan)
    for before_L, now_L in pairwise(core_RL):
        change_DH[now_L] = finite_mean(np.abs(entropy_TDH[:, now_L] - entropy_TDH[:, before_L]), 0)
    return change_DH
