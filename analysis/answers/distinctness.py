"""What only the residuals themselves can show: one token's path through the loop, and how far layers lie
apart.

Both read the few rows and depths they need, never the whole `state` array.

Source: arXiv 2604.11791, section 4.1, figure 5, and section 4.2.
"""

from pathlib import Path

import numpy as np
import xarray as xr

from ...errors import NothingCapturedError, StatesMissingError
from ..depths import Depths, depths_of
from ..folds import STATISTICS, MeanFold
from ..state_rows import decoded
from ..streaming import as_dataset, iter_sequences

_BLOCK_BYTES = 2**25  # float64 workspace, so that a long sequence does not multiply memory
_TINY = np.finfo(float).tiny  # keeps 0 / 0 at 0


def trajectory(
    store: str | Path | xr.Dataset, sequence_id: int | None = None, components: int = 3
) -> xr.Dataset:
    """Principal components of one token's residuals over every kept core depth.

    Args:
        store: path of a store, or a Dataset laid out like one.
        sequence_id: which sequence (its row in the data); the first with a kept state if left out. Its last
            kept token is shown.
        components: how many principal components.
    Returns:
        Dataset: `position` [point, component] in residual units, `explained` [component] (share of the
            variance), with coordinates depth, layer and recurrence on point; attributes `sequence_id`,
            `token_position`, `num_points`, `non_finite`.
    Raises:
        StatesMissingError: no core states, or none of that sequence, are kept.
    """
    dataset = as_dataset(store)
    depths = depths_of(dataset)
    core, depth = core_states(dataset, depths)
    rows = last_rows(dataset)
    sequence = next(iter(rows)) if sequence_id is None else sequence_id
    row = row_of(rows, sequence)
    states = dataset["state"].isel({dataset["state"].dims[0]: row, "depth_state": core})
    x_PD = decoded(states).astype(np.float64)
    finite = np.isfinite(x_PD).all(axis=1)
    if finite.sum() < 2:
        raise StatesMissingError(
            f"the states of sequence {sequence} are not finite: there is no path to draw"
        )
    x_PD, depth = x_PD[finite], depth[finite]
    u_PK, scale_K, _ = np.linalg.svd(x_PD - x_PD.mean(axis=0), full_matrices=False)
    position_PK = (u_PK * scale_K)[:, :components]
    position_PK *= np.where(
        position_PK[-1] < 0, -1, 1
    )  # a sign is arbitrary: the path ends on the positive side
    explained_K = scale_K**2 / max((scale_K**2).sum(), _TINY)
    return xr.Dataset(
        {
            "position": (("point", "component"), position_PK, {"units": "residual units"}),
            "explained": ("component", explained_K[:components], {"units": "share of variance"}),
        },
        {
            "depth": ("point", depth),
            "layer": ("point", depths.layer[depth]),
            "recurrence": ("point", depths.recurrence[depth]),
        },
        {
            "sequence_id": sequence,
            "token_position": position_of(dataset, row),
            "num_points": len(depth),
            "non_finite": int((~finite).sum()),
        },
    )


def distinctness(store: str | Path | xr.Dataset) -> xr.Dataset:
    """How far apart the core's layers lie after the last recurrence, for every pair of layers.

    Returns:
        Dataset: `cosine` and `relative_distance` (over the mean of the two norms) [layer, other_layer], means
        over sequences of means over kept tokens; `least_cosine` [statistic: value, low, high, sequences] of
        the pair of layers with the least mean cosine; `cycle_size` [statistic], the root mean square distance
        of a token's layers from their mean over the mean of their norms, which is 0 where all layers share
        one point; attributes `pair`, `num_tokens`, `non_finite`.
    Raises:
        StatesMissingError: not every core layer's state is kept for the last recurrence.
        NothingCapturedError: no kept token is captured yet.
    """
    dataset = as_dataset(store)
    depths = depths_of(dataset)
    last = _last_core_states(dataset, depths)
    num_layers = last.sizes["depth_state"]
    fold, size, num_tokens, bad = MeanFold((2, num_layers, num_layers)), MeanFold(1), 0, 0
    for arrays in iter_sequences(last, []):
        assert arrays.states is not None
        total_2LL, total_size, num_finite = np.zeros((2, num_layers, num_layers)), 0.0, 0
        for x_TLD in arrays.states.blocks():
            finite = np.isfinite(x_TLD).all(axis=(1, 2))
            bad += int((~finite).sum())
            num_finite += int(finite.sum())
            of_block_2LL, of_block = _sums_of_pairs(x_TLD[finite])
            total_2LL, total_size = total_2LL + of_block_2LL, total_size + of_block
        num_tokens += num_finite
        if num_finite:
            fold.add(total_2LL / num_finite)
            size.add(np.array([total_size / num_finite]))
    if not num_tokens:
        raise NothingCapturedError(
            "no kept token of a finished unit has finite states: there is nothing to compare"
        )
    statistics_42LL = fold.result()
    cosine_LL, distance_LL = statistics_42LL[0]
    pair = np.unravel_index(
        np.where(np.eye(num_layers, dtype=bool), np.inf, cosine_LL).argmin(), cosine_LL.shape
    )
    layer = np.arange(num_layers)
    return xr.Dataset(
        {
            "cosine": (("layer", "other_layer"), cosine_LL, {"units": "cosine"}),
            "relative_distance": (("layer", "other_layer"), distance_LL, {"units": "share of the norm"}),
            "least_cosine": ("statistic", statistics_42LL[:, 0, *pair]),
            "cycle_size": ("statistic", size.result()[:, 0], {"units": "share of the norm"}),
        },
        {"layer": layer, "other_layer": layer, "statistic": list(STATISTICS)},
        {"pair": [int(index) for index in pair], "num_tokens": num_tokens, "non_finite": bad},
    )


def _last_core_states(dataset: xr.Dataset, depths: Depths) -> xr.Dataset:
    """The dataset with the core layers' states after the last recurrence, in the order of layers."""
    core_RL = depths.core_RL
    if core_RL.shape[1] < 2:
        why = "the core has one layer: there are no two points to tell apart"
        raise StatesMissingError(why if len(core_RL) else "the model has no loop")
    kept = _kept_depths(dataset)
    found = [np.flatnonzero(kept == depth) for depth in core_RL[-1]]
    if not all(len(index) for index in found):
        num_kept = sum(len(index) for index in found)
        what = f"{num_kept} of {len(found)} core layers at the last recurrence"
        raise StatesMissingError(_advice(depths, what, "--states 'core[all]@last'"))
    return dataset.isel(depth_state=np.concatenate(found))


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


def core_states(dataset: xr.Dataset, depths: Depths) -> tuple[np.ndarray, np.ndarray]:
    """Places of the kept core states on `depth_state`, and their depths.

    Raises:
        StatesMissingError: fewer than two are kept.
    """
    kept = _kept_depths(dataset)
    core = np.flatnonzero(depths.recurrence[kept] >= 0)
    if len(core) < 2:
        raise StatesMissingError(_advice(depths, f"{len(core)} core depths", "--states core"))
    return core, kept[core]


def last_rows(dataset: xr.Dataset) -> dict[int, int]:
    """Row of `state` of each sequence's last kept token, by the sequence's id, in the order of ids.

    Raises:
        NothingCapturedError: no token with a kept state is captured yet.
    """
    owner = dataset["token_sequence"].values
    if "state_token" in dataset.coords:
        slot = dataset["state_token"].values
        owner = np.where(slot >= 0, owner[slot], -1)
    rows = np.flatnonzero(owner >= 0)
    if not len(rows):
        raise NothingCapturedError(
            "no token with a kept state is captured yet: run the capture command again"
        )
    ids = dataset["sequence_id"].values[owner[rows]]
    found, from_end = np.unique(ids[::-1], return_index=True)
    return dict(zip(found.tolist(), rows[::-1][from_end].tolist(), strict=True))


def num_kept(dataset: xr.Dataset) -> int:
    """Tokens whose states are kept, of finished units."""
    owner = dataset["token_sequence"].values
    if "state_token" in dataset.coords:
        slot = dataset["state_token"].values
        return int((owner[slot[slot >= 0]] >= 0).sum())
    return int((owner >= 0).sum())


def position_of(dataset: xr.Dataset, row: int) -> int:
    """Place in its sequence of the token that a row of `state` is of."""
    slot = int(dataset["state_token"][row]) if "state_token" in dataset.coords else row
    return int(dataset["token_position"][slot])


def row_of(rows: dict[int, int], sequence: int) -> int:
    """A sequence's row among `last_rows`; StatesMissingError where none of it is kept."""
    if sequence not in rows:
        raise StatesMissingError(f"no state of sequence {sequence} is kept; kept are {_some(list(rows))}")
    return rows[sequence]


def _kept_depths(dataset: xr.Dataset) -> np.ndarray:
    if "state" not in dataset:
        raise StatesMissingError(
            "no states are kept: capture again with --quantities all,state --states core"
        )
    return dataset["state_depth"].values.astype(np.int64)


def _advice(depths: Depths, kept: str, states: str) -> str:
    if not len(depths.core_RL):
        return "the model has no loop"
    return f"states of {kept} are kept: capture again with --quantities all,state {states}"


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
