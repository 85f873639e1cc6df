"""How far apart the loop's layers lie after the last recurrence: whether each has a point of its own.

Source: arXiv 2604.11791, section 4.2.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from ...errors import CannotTellError
from ..depth_axis import Depths, depths_of
from ..folds import STATISTICS, MeanFold
from ..kept_states import advice, kept_depths
from ..streaming import Arrays, as_dataset
from ..walk import Analysis, answer

_BLOCK_BYTES = 2**25  # float64 workspace, so that a long sequence does not multiply memory
_TINY = np.finfo(float).tiny  # keeps 0 / 0 at 0


class _DistinctnessFold:
    def __init__(self, dataset: xr.Dataset, depths: Depths) -> None:
        self._places = _last_states(dataset, depths)
        L = len(self._places)
        self._pairs, self._size = MeanFold((2, L, L)), MeanFold(1)
        self._num_tokens, self._bad = 0, 0

    def add(self, arrays: Arrays) -> None:
        assert arrays.states is not None  # the analysis is asked for only if states are kept
        total_2LL, total_size, num_finite = np.zeros_like(self._pairs.mean), 0.0, 0
        for x_TLD in arrays.states.blocks(self._places):
            finite = np.isfinite(x_TLD).all(axis=(1, 2))
            self._bad += int((~finite).sum())
            num_finite += int(finite.sum())
            of_block_2LL, of_block = _sums_of_pairs(x_TLD[finite])
            total_2LL, total_size = total_2LL + of_block_2LL, total_size + of_block
        self._num_tokens += num_finite
        if num_finite:
            self._pairs.add(total_2LL / num_finite)
            self._size.add(np.array([total_size / num_finite]))

    def result(self) -> xr.Dataset:
        if not self._num_tokens:
            raise CannotTellError(
                "no kept token of a finished unit has finite states: there is nothing to compare"
            )
        statistics_42LL = self._pairs.result()
        cosine_LL, distance_LL = statistics_42LL[0]
        L = len(cosine_LL)
        pair = np.unravel_index(np.where(np.eye(L, dtype=bool), np.inf, cosine_LL).argmin(), (L, L))
        layer = np.arange(L)
        return xr.Dataset(
            {
                "cosine": (("layer", "other_layer"), cosine_LL, {"units": "cosine"}),
                "relative_distance": (("layer", "other_layer"), distance_LL, {"units": "share of the norm"}),
                "least_cosine": ("statistic", statistics_42LL[:, 0, *pair]),
                "cycle_size": ("statistic", self._size.result()[:, 0], {"units": "share of the norm"}),
            },
            {"layer": layer, "other_layer": layer, "statistic": list(STATISTICS)},
            {
                "pair": [int(index) for index in pair],
                "num_tokens": self._num_tokens,
                "non_finite": self._bad,
            },
        )


def _last_states(dataset: xr.Dataset, depths: Depths) -> np.ndarray:
    """Places on `depth_state` of the layers' states after the last recurrence, in the order of layers."""
    loop_RL = depths.core_RL
    if loop_RL.shape[1] < 2:
        why = "the core has one layer: there are no two points to tell apart"
        raise CannotTellError(why if len(loop_RL) else "the model has no loop")
    kept = kept_depths(dataset, depths)
    found = [np.flatnonzero(kept == depth) for depth in loop_RL[-1]]
    if not all(len(index) for index in found):
        num_kept = sum(len(index) for index in found)
        what = f"states of {num_kept} of {len(found)} core layers at the last recurrence are kept"
        raise CannotTellError(advice(depths, what, "'core[all]@last'"))
    return np.concatenate(found)


def _sums_of_pairs(x_TLD: np.ndarray) -> tuple[np.ndarray, float]:
    """Cosine and relative distance of every pair of layers, float64 [2, layer, layer], and the size of the
    cycle, both summed over tokens.
    """
    T, L, D = x_TLD.shape
    total_2LL, total_size = np.zeros((2, L, L)), 0.0
    block = max(1, _BLOCK_BYTES // (8 * L * D))
    for start in range(0, T, block):
        block_TLD = x_TLD[start : start + block].astype(np.float64)
        gram_TLL = block_TLD @ block_TLD.transpose(0, 2, 1)
        square_TL = np.einsum("tll->tl", gram_TLL)
        norm_TL = np.sqrt(square_TL)
        product_TLL = norm_TL[:, :, None] * norm_TL[:, None, :]
        square_TLL = square_TL[:, :, None] + square_TL[:, None, :] - 2 * gram_TLL
        mean_TLL = (norm_TL[:, :, None] + norm_TL[:, None, :]) / 2
        total_2LL[0] += np.clip(gram_TLL / np.maximum(product_TLL, _TINY), -1, 1).sum(axis=0)
        total_2LL[1] += (np.sqrt(np.maximum(square_TLL, 0)) / np.maximum(mean_TLL, _TINY)).sum(axis=0)
        # the mean square distance of points from their mean is half that of all pairs of them
        spread_T = np.sqrt(np.maximum(square_TLL, 0).mean(axis=(1, 2)) / 2)
        total_size += float((spread_T / np.maximum(norm_TL.mean(axis=1), _TINY)).sum())
    return total_2LL, total_size


def _tables(found: xr.Dataset) -> dict[str, pd.DataFrame]:
    """Returns two tables: a row for each pair of layers, and the numbers that are of all of them."""
    parts = {"distinctness": ["cosine", "relative_distance"], "cycle": ["least_cosine", "cycle_size"]}
    return {name: found[names].to_dataframe().reset_index() for name, names in parts.items()}


_DISTINCTNESS = Analysis(
    "distinctness",
    "Distinctness",
    ("state",),
    "cosine and relative distance of the residuals of every two of the loop's layers after the last "
    "recurrence, and how far a token's layers lie around their mean; mean over kept tokens, then "
    "over sequences",
    _DistinctnessFold,
    tables=_tables,
)
ANALYSES = [_DISTINCTNESS]


def distinctness(store: str | Path | xr.Dataset) -> xr.Dataset:
    """How far apart the core's layers lie after the last recurrence, for every pair of layers.

    Returns:
        Dataset: `cosine` and `relative_distance` (over the mean of the two norms) [layer, other_layer], means
        over sequences of means over kept tokens; `least_cosine` [statistic: value, low, high, sequences] of
        the pair of layers with the least mean cosine; `cycle_size` [statistic], the root mean square distance
        of a token's layers from their mean over the mean of their norms, which is 0 where all layers share
        one point; attributes `pair`, `num_tokens`, `non_finite`.
    Raises:
        CannotTellError: not every layer's state is kept for the last recurrence, or none that is finite.
        NothingCapturedError: no sequence is finished yet.
    """
    dataset = as_dataset(store)
    places = _last_states(dataset, depths_of(dataset))
    return answer(dataset.isel(depth_state=places), _DISTINCTNESS)  # no other depth is read
