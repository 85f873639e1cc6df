"""The recurrence at which each token's answer is settled, as the model's own head reads the loop state.

Source: the logit lens (nostalgebraist, 2020) at every recurrence of the loop.
"""

from pathlib import Path

import numpy as np
import xarray as xr

from ..depth_axis import Depths
from ..folds import STATISTICS, MeanFold
from ..streaming import Arrays
from ..walk import Analysis, answer


def settled_at(token_TR: np.ndarray) -> np.ndarray:
    """Returns the first recurrence from which a token's likeliest next token stays the final one, [token]."""
    differs_TR = token_TR != token_TR[:, -1:]
    R = token_TR.shape[1]
    return np.where(differs_TR.any(axis=1), R - differs_TR[:, ::-1].argmax(axis=1), 0)


class _SettlingFold:
    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        R = len(depths.core_RL)
        self._settled, self._mean = MeanFold(R), MeanFold(1)
        self._count_R = np.zeros(R, np.int64)

    def add(self, arrays: Arrays) -> None:
        token_TR = arrays["lens_token"]
        token_TR = token_TR[(token_TR >= 0).all(axis=1)]  # -1: the model's numbers were no numbers
        if not len(token_TR):
            return
        at_T = settled_at(token_TR)
        count_R = np.bincount(at_T, minlength=len(self._count_R))
        self._count_R += count_R
        self._settled.add(count_R.cumsum() / len(at_T))
        self._mean.add(at_T.mean(keepdims=True))

    def result(self) -> xr.Dataset:
        recurrence = np.arange(len(self._count_R))
        share, tokens = {"units": "share of tokens"}, {"units": "tokens"}
        return xr.Dataset(
            {
                "settled": (("statistic", "recurrence"), self._settled.result(), share),
                "count": ("recurrence", self._count_R, tokens),
                "mean_recurrence": ("statistic", self._mean.result()[:, 0], {"units": "recurrences"}),
            },
            {"statistic": list(STATISTICS), "recurrence": recurrence},
            {"num_tokens": int(self._count_R.sum())},
        )


_SETTLING = Analysis(
    "settling",
    "When answers settle",
    ("lens_token",),
    "recurrence from which a token's likeliest next token stays the one after the last recurrence",
    _SettlingFold,
    first=0,
)
ANALYSES = [_SETTLING]


def settling(store: str | Path | xr.Dataset) -> xr.Dataset:
    """Recurrences at which tokens' answers are settled.

    Returns:
        Dataset: `settled` [statistic, recurrence], share of tokens whose answer stays from that recurrence on
        (mean over sequences); `count` [recurrence], tokens by the recurrence at which they settle;
        `mean_recurrence` [statistic]. A token that settles at the last recurrence may not have settled at
        all.
    Raises:
        CannotTellError: the lens was not captured, or the model does not loop.
        NothingCapturedError: no sequence is finished yet.
    """
    return answer(store, _SETTLING)
