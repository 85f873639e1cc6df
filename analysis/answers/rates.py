"""How fast each core layer converges: the factor by which its step shrinks with every recurrence.

A linear contraction shrinks every step by one factor, its rate. What is fitted is the logarithm of each
token's steps against the recurrence, by least squares, from the first step to the last one above rounding,
and of these the later half: a model's first steps are larger than its slowest direction accounts for. Steps
serve better than gaps, whose end is bent by the last state standing in for the fixed point.
"""

from pathlib import Path

import numpy as np
import xarray as xr

from ...capture.store.plan import plan_of
from ...errors import CannotTellError
from ..depth_axis import Depths
from ..folds import STATISTICS, MeanFold, MedianFold, finite_mean
from ..streaming import Arrays
from ..thresholds import EPSILON, ROUNDING_STEPS, rounding_step
from ..walk import Analysis, answer

LEAST_STEPS = 3  # two steps always lie on a line
QUARTILES = (0.25, 0.5, 0.75)
_BLOCK_BYTES = 2**22  # float64 of one block of tokens, several of which are at work


def fit_rates(step_RS: np.ndarray, floor_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits the rate of every series of steps.

    Args:
        step_RS: distance of each state to the one before, finite [recurrence, series].
        floor_RS: what rounding alone may make of a step, same shape.
    Returns:
        rate (factor per recurrence), NaN where fewer than `LEAST_STEPS` steps in a row from the first one on
        are above rounding, and how many are, both [series].
    """
    num_R = len(step_RS)
    below_RS = step_RS <= floor_RS
    window_S = np.where(below_RS.any(axis=0), below_RS.argmax(axis=0), num_R)
    start_S = np.minimum(window_S // 2, np.maximum(window_S - LEAST_STEPS, 0))
    t_R1 = np.arange(num_R)[:, None]
    inside_RS = (t_R1 >= start_S) & (t_R1 < window_S)
    log_RS = np.log(step_RS, out=np.zeros(step_RS.shape), where=inside_RS)
    away_RS = np.where(inside_RS, t_R1 - (start_S + window_S - 1) / 2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope_S = np.einsum("rs,rs->s", away_RS, log_RS) / np.einsum("rs,rs->s", away_RS, away_RS)
    return np.where(window_S >= LEAST_STEPS, np.exp(slope_S), np.nan), window_S


class _RatesFold:
    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        self._core_RL = depths.core_RL
        R, L = self._core_RL.shape
        if R <= LEAST_STEPS:
            raise CannotTellError(
                f"{R} recurrences have {R - 1} steps and a rate takes {LEAST_STEPS}: "
                f"capture again with --recurrences {LEAST_STEPS + 1} or more"
            )
        self._dtype = plan_of(dataset).settings.dtype
        self._floor = rounding_step(EPSILON[self._dtype])
        self._log_rate, self._window = MeanFold(L), MeanFold(L)
        # if there are more rates than are kept, the median is right within 0.2 % from 0.0001 to 10
        self._tokens = MedianFold(L, lowest=1e-4, decades=5, bins_per_decade=1024)
        self._fitted_L, self._refused_L, self._bad_L = (np.zeros(L, np.int64) for _ in range(3))

    def add(self, arrays: Arrays) -> None:
        num_R, L = self._core_RL[1:].shape
        T = len(arrays["step_norm"])
        rate_TL, window_TL = np.full((T, L), np.nan), np.full((T, L), np.nan)
        few = max(1, _BLOCK_BYTES // (8 * num_R * L))
        for start in range(0, T, few):
            rows = slice(start, start + few)
            step_RTL, norm_RTL = (
                arrays[name][rows, self._core_RL[1:]].swapaxes(0, 1).astype(np.float64)
                for name in ("step_norm", "residual_norm")
            )
            finite_TL = np.isfinite(step_RTL).all(axis=0) & np.isfinite(norm_RTL).all(axis=0)
            found = fit_rates(step_RTL[:, finite_TL], self._floor * norm_RTL[:, finite_TL])
            rate_TL[rows][finite_TL], window_TL[rows][finite_TL] = found
        self._log_rate.add(finite_mean(np.log(rate_TL), 0))
        self._window.add(finite_mean(window_TL, 0))
        self._tokens.add(rate_TL)
        fitted_L, finite_L = np.isfinite(rate_TL).sum(axis=0), np.isfinite(window_TL).sum(axis=0)
        self._fitted_L += fitted_L
        self._refused_L += finite_L - fitted_L
        self._bad_L += T - finite_L

    def result(self) -> xr.Dataset:
        if not self._fitted_L.any():
            raise CannotTellError(
                f"no token's step stays above rounding in {self._dtype} for {LEAST_STEPS} recurrences: the "
                "loop converges at once, or capture again with --dtype float32"
            )
        log_4L = self._log_rate.result()
        rate_4L = np.concatenate([np.exp(log_4L[:3]), log_4L[3:]])
        half_life_4L = np.concatenate([half_life(rate_4L[:3]), log_4L[3:]])
        median, low, high, _ = self._tokens.result()
        over_sequences, tokens = ("statistic", "layer"), {"units": "tokens"}
        return xr.Dataset(
            {
                "rate": (over_sequences, rate_4L, {"units": "factor per recurrence"}),
                "half_life": (over_sequences, half_life_4L, {"units": "recurrences"}),
                "token_rate": (
                    ("quartile", "layer"),
                    [low, median, high],
                    {"units": "factor per recurrence"},
                ),
                "window": (over_sequences, self._window.result(), {"units": "recurrences"}),
                "fitted": ("layer", self._fitted_L, tokens),
                "refused": ("layer", self._refused_L, tokens),
            },
            {
                "statistic": list(STATISTICS),
                "layer": np.arange(len(self._fitted_L)),
                "quartile": list(QUARTILES),
            },
            {"rounding": self._floor, "non_finite": self._bad_L.tolist()},
        )


def half_life(rate: np.ndarray) -> np.ndarray:
    """Recurrences until a distance is half of what it was; infinite from a rate of 1 on."""
    with np.errstate(divide="ignore", invalid="ignore"):
        halved = np.log(0.5) / np.log(rate)
    return np.where(rate < 1, halved, np.where(np.isnan(rate), np.nan, np.inf))


def slowest_half_life(found: xr.Dataset | str) -> float:
    """Recurrences in which the steps of the slowest layer halve; infinite where they do not.

    Args:
        found: result of `rates`, or the reason why there is none, which gives NaN.
    """
    if isinstance(found, str):
        return np.nan
    half_life_L = found["half_life"].sel(statistic="value").values
    return float(half_life_L[~np.isnan(half_life_L)].max(initial=0))


_RATES = Analysis(
    "rates",
    "How fast layers converge",
    ("step_norm", "residual_norm"),
    "factor per recurrence by which a token's step shrinks, by least squares of its logarithm over the later "
    f"half of the recurrences before it falls to rounding ({ROUNDING_STEPS} machine epsilons of the norm); "
    "geometric mean over tokens, then over sequences with a 95 % band; tokens with fewer than "
    f"{LEAST_STEPS} such steps are left out; half-life: ln 0.5 / ln rate",
    _RatesFold,
    first=1,
)
ANALYSES = [_RATES]


def rates(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Rate of convergence and half-life of every core layer.

    Returns:
        Dataset: `rate` and `half_life` [statistic, layer], `token_rate` [quartile, layer] over all tokens,
        `window` [statistic, layer] (how many steps a token has above rounding), `fitted` and `refused`
        [layer] (numbers of tokens). Attributes `rounding` (share of the norm) and `non_finite` (tokens left
        out, by layer). A rate of 1 and more does not converge: its half-life is infinite.
    Raises:
        CannotTellError: there is none, and the message says what to capture.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _RATES)
