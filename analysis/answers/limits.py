"""The end of each token's residual in the loop: a fixed point, an orbit, sliding on, or unknown.

Each token and core layer has one series, the cosine of its residual after every recurrence to the one after
the last. The thresholds are the paper's (arXiv 2604.11791, appendix C, algorithm 1: tau 0.05, rho 0.9). The
rule is not in its text and is our reading, on the last two thirds of the recurrences:

- fixed point: at least rho of them are within tau of cosine 1;
- orbit: the series repeats with a period of 2 to a third of all recurrences: values one period apart differ
  by at most tau for at least rho of them, and one period before the end the residual was within tau of where
  it ends, but not all the way since;
- slider: the cosine rises to the end: its rank correlation with the recurrence is at least rho;
- unknown: none of these.

A cosine sees directions alone: a residual that grows without turning counts as a fixed point, and one that
still comes nearer after a third of the recurrences counts as a slider.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr

from ...errors import CannotTellError
from ..depth_axis import Depths
from ..folds import BAND_Z, STATISTICS
from ..streaming import Arrays
from ..walk import Analysis, answer

LIMITS = ("fixed_point", "orbit", "slider", "unknown")
FIXED_POINT, ORBIT, SLIDER, UNKNOWN = range(len(LIMITS))
TAU = 0.05  # paper, appendix C
RHO = 0.9  # paper, appendix C
LEAST_RECURRENCES = 12  # the last two thirds are 8: fewer show no orbit of 2 four times over
# a lag's mean squared difference is twice the variance where nothing repeats: the lag is as good as the best
# up to this factor, which is noise, and agrees below this share of the variance
_SAME, _AGREES = 2.0, 0.1
_BLOCK_BYTES = 2**22  # one block of series, so that lags are compared in the cache


def classify(cosine_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classifies the limiting behaviour of every series.

    Args:
        cosine_RS: cosine to the state after the last recurrence, finite [recurrence, series], at least
            `LEAST_RECURRENCES` recurrences.
    Returns:
        index into `LIMITS`, int8 [series], and the period in recurrences of orbits, else 0, int16 [series].
    """
    R, S = cosine_RS.shape
    tail_WS = cosine_RS[R // 3 :]
    near_WS = 1 - tail_WS <= TAU
    limit_S, period_S = np.full(S, UNKNOWN, np.int8), np.zeros(S, np.int16)
    is_fixed_S = near_WS.sum(axis=0) >= RHO * len(tail_WS)
    limit_S[is_fixed_S] = FIXED_POINT
    moving = np.flatnonzero(~is_fixed_S)
    if not len(moving):
        return limit_S, period_S
    tail_WM = tail_WS[:, moving]
    found_M = _period(tail_WM, R // 3)
    is_orbit_M = _repeats(tail_WM, near_WS[:, moving], found_M)
    limit_S[moving[is_orbit_M]] = ORBIT
    period_S[moving[is_orbit_M]] = found_M[is_orbit_M]
    is_slider_M = ~is_orbit_M
    is_slider_M[is_slider_M] = _rises(tail_WM[:, is_slider_M])
    limit_S[moving[is_slider_M]] = SLIDER
    return limit_S, period_S


def _period(tail_WS: np.ndarray, longest: int) -> np.ndarray:
    """Returns the smallest lag that agrees as well as any and better than its neighbours, else 1."""
    S = tail_WS.shape[1]
    off_PS = np.empty((longest, S))
    for lag in range(1, longest + 1):
        apart_WS = tail_WS[lag:] - tail_WS[:-lag]
        off_PS[lag - 1] = np.einsum("ws,ws->s", apart_WS, apart_WS) / len(apart_WS)
    is_dip_PS = np.zeros((longest, S), bool)
    is_dip_PS[1:] = off_PS[1:] < off_PS[:-1]
    is_dip_PS[:-1] &= off_PS[:-1] <= off_PS[1:]
    least_S = np.where(is_dip_PS, off_PS, np.inf).min(axis=0)
    enough_S = np.maximum(_SAME * least_S, _AGREES * tail_WS.var(axis=0))
    return (is_dip_PS & (off_PS <= enough_S)).argmax(axis=0) + 1


def _repeats(tail_WS: np.ndarray, near_WS: np.ndarray, period_S: np.ndarray) -> np.ndarray:
    """Whether each series repeats with its period, and leaves and comes back within the last one."""
    W, S = tail_WS.shape
    repeats_S = np.zeros(S, bool)
    for period in np.unique(period_S[period_S > 1]):
        here = np.flatnonzero(period_S == period)
        tail_WH, near_WH = tail_WS[:, here], near_WS[:, here]
        agree_WH = np.abs(tail_WH[period:] - tail_WH[:-period]) <= TAU
        back_H, stayed_H = near_WH[W - 1 - period], near_WH[W - period : W - 1].all(axis=0)
        repeats_S[here] = (agree_WH.sum(axis=0) >= RHO * len(agree_WH)) & back_H & ~stayed_H
    return repeats_S


def _rises(tail_WS: np.ndarray) -> np.ndarray:
    """Whether the rank correlation (Spearman's) of each series with the recurrence is at least rho."""
    half = len(tail_WS) // 2
    falls_S = (tail_WS[half:] < tail_WS[:-half]).mean(axis=0)
    # a pair that falls over half of the time moves two ranks by that much together: where a share f of them
    # falls, the correlation is at most 1 - 3f/8, so these alone need sorting
    may_S = falls_S <= 4 * (1 - RHO)
    tail_WM = tail_WS[:, may_S]
    later_W = np.arange(len(tail_WS)) - (len(tail_WS) - 1) / 2
    forth_WM = tail_WM.argsort(axis=0, kind="stable").argsort(axis=0)
    back_WM = tail_WM[::-1].argsort(axis=0, kind="stable").argsort(axis=0)
    # ties rank by time in the one and against it in the other, and so not at all
    may_S[may_S] = (later_W @ forth_WM - later_W @ back_WM) / 2 >= RHO * (later_W @ later_W)
    return may_S


def wilson(share: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share of `total`; NaN where that is 0.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        square = BAND_Z**2 / total
        middle = (share + square / 2) / (1 + square)
        half = np.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


class _Shares:
    """Counts of a yes or no of tokens, sequence by sequence, and the share with its interval."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count, self.total, self.sequences = (np.zeros(shape) for _ in range(3))
        self._squares = np.zeros((3, *shape))  # sums of count², count · total and total²

    def add(self, count: np.ndarray, total: np.ndarray) -> None:
        total = np.broadcast_to(total, count.shape)
        self.count += count
        self.total += total
        self.sequences += total > 0
        self._squares += np.stack([count * count, count * total, total * total])

    def result(self) -> np.ndarray:
        """float64 [4, ...]: share of all tokens, low, high, number of sequences.

        Wilson's interval over tokens. Where sequences differ by more than chance, the number of tokens is
        divided by that excess (Kish's design effect); where no token, or every one, is a yes, it is not.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self.count / self.total
            cc, ct, tt = self._squares
            spread = (cc - 2 * share * ct + share**2 * tt) * self.sequences / (self.sequences - 1)
            excess = spread / (share * (1 - share) * self.total)
            excess = np.where(np.isfinite(excess), np.maximum(excess, 1), 1)
            low, high = wilson(share, self.total / excess)
        return np.stack([share, low, high, self.sequences])


class _LimitsFold:
    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        self._core_RL = depths.core_RL
        R, L = self._core_RL.shape
        if R < LEAST_RECURRENCES:
            raise CannotTellError(
                f"{R} recurrences are too few to see where they lead: capture again with --recurrences "
                f"{LEAST_RECURRENCES} or more (the paper uses 128)"
            )
        C = len(LIMITS)
        self._shares, self._together = _Shares((L, C)), _Shares((C, C))
        self._pairs = np.zeros((L * C, L * C), np.int64)
        self._periods_LP = np.zeros((L, R // 3 + 1), np.int64)
        self._num_tokens, self._bad_L = 0, np.zeros(L, np.int64)

    def add(self, arrays: Arrays) -> None:
        C, L = len(LIMITS), self._core_RL.shape[1]
        count_LC, both_CC = np.zeros((L, C), np.int64), np.zeros((C, C), np.int64)
        with_C = np.zeros(C, np.int64)
        for is_TLC in self._classes(arrays["gap_cosine"]):
            count_LC += is_TLC.sum(axis=0)
            flat = is_TLC.reshape(len(is_TLC), -1).astype(np.float32)
            self._pairs += (flat.T @ flat).astype(np.int64)
            layers_TC = is_TLC.sum(axis=1)
            needed_CC = 1 + np.eye(C, dtype=int)  # a limit paired with itself needs two layers
            both_CC += ((layers_TC[:, :, None] > 0) & (layers_TC[:, None, :] >= needed_CC)).sum(axis=0)
            with_C += (layers_TC > 0).sum(axis=0)
        self._shares.add(count_LC, count_LC.sum(axis=1, keepdims=True))
        self._together.add(both_CC, with_C[:, None])
        self._num_tokens += len(arrays["gap_cosine"])

    def _classes(self, cosine_TD: np.ndarray) -> Iterator[np.ndarray]:
        """Yields whether each layer has each limit, a few tokens at a time, bool [token, layer, limit]."""
        R, L = self._core_RL.shape
        few = max(1, _BLOCK_BYTES // (4 * R * L))
        for start in range(0, len(cosine_TD), few):
            cosine_RTL = cosine_TD[start : start + few, self._core_RL].swapaxes(0, 1)
            cosine_RS = np.ascontiguousarray(cosine_RTL.reshape(R, -1))
            finite = np.flatnonzero(np.isfinite(cosine_RS).all(axis=0))
            limit_S, period_S = classify(
                cosine_RS if len(finite) == cosine_RS.shape[1] else cosine_RS[:, finite]
            )
            layer_S = finite % L
            self._bad_L += cosine_RTL.shape[1] - np.bincount(layer_S, minlength=L)
            np.add.at(self._periods_LP, (layer_S, period_S), 1)
            is_SC = np.zeros((cosine_RS.shape[1], len(LIMITS)), bool)
            is_SC[finite, limit_S] = True
            yield is_SC.reshape(-1, L, len(LIMITS))

    def result(self) -> xr.Dataset:
        if not self._shares.total.any():
            raise CannotTellError("no token has a finite cosine after every recurrence")
        L, C = self._shares.count.shape
        pairs_LCLC = self._pairs.reshape(L, C, L, C)
        total_LCL = pairs_LCLC.sum(axis=3, keepdims=True)  # tokens with finite cosines at both layers
        with np.errstate(invalid="ignore"):
            conditional_LCLC = pairs_LCLC / total_LCL
        layers, tokens = np.arange(L), {"units": "tokens"}
        shares, given = {"units": "share of tokens"}, {"units": "share of the tokens with the first limit"}
        pair = ("layer", "limit", "other_layer", "other_limit")
        return xr.Dataset(
            {
                "share": (("statistic", "layer", "limit"), self._shares.result(), shares),
                "count": (("layer", "limit"), self._shares.count.astype(np.int64), tokens),
                "period_count": (("layer", "period"), self._periods_LP[:, 2:], tokens),
                "conditional": (pair, conditional_LCLC, given),
                "together": (("statistic", "limit", "other_limit"), self._together.result(), given),
            },
            {
                "statistic": list(STATISTICS),
                "layer": layers,
                "other_layer": layers,
                "limit": list(LIMITS),
                "other_limit": list(LIMITS),
                "period": np.arange(2, self._periods_LP.shape[1]),
            },
            {"tau": TAU, "rho": RHO, "num_tokens": self._num_tokens, "non_finite": self._bad_L.tolist()},
        )


_LIMITS = Analysis(
    "limits",
    "Where tokens end up",
    ("gap_cosine",),
    "share of tokens whose residual reaches a fixed point, circles on an orbit, slides on, or neither, from "
    f"its cosine to the last recurrence: within {TAU} for {RHO:.0%} of the last two thirds (thresholds: the "
    "paper's appendix C; the rule: our reading); bands: Wilson's, over tokens, wider where sequences differ",
    _LimitsFold,
    first=0,
)
ANALYSES = [_LIMITS]


def limits(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Limiting behaviour of every token at every core layer.

    Returns:
        Dataset: `share` [statistic, layer, limit] of tokens with its 95 % interval, `count` [layer, limit],
        `period_count` [layer, period] of orbits by period in recurrences; `conditional` [layer, limit,
        other_layer, other_limit], how many of the tokens with one limit at a layer have the other at another
        layer; `together` [statistic, limit, other_limit], how many of the tokens with one limit at any layer
        have the other at any other. Attributes `tau`, `rho`, `num_tokens`, `non_finite` (tokens left out, by
        layer). The paper's curve is that of the last layer.
    Raises:
        CannotTellError: there is none, and the message says what to capture.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _LIMITS)
