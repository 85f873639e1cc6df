"""The paper's measures by depth: one table of what each is, and one function that computes them from a store.

A measure turns the captured quantities of one sequence into a value per depth; `measure` walks the store
once per group of quantities that must be read together and folds the sequences. What was not captured is
named, with what to capture.

Source: arXiv 2604.11791, sections 3 and 4 and appendix B.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import xarray as xr

from ..capture.store.quantities import QUANTITIES
from .loop_state import mean_at_loop_state, settled_share, to_depths
from .streaming import (
    Depths,
    MaxFold,
    MeanFold,
    MedianFold,
    NothingCapturedError,
    as_dataset,
    depths_of,
    finite_mean,
    iter_sequences,
)

Arrays = Mapping[
    str, np.ndarray
]  # the quantities of one sequence, each [token, depth] or [token, depth, head]

SINK_SCORE = (
    0.3  # a head whose mean mass on the first key reaches this counts as a sink head, as in the paper
)
STATISTICS = ("value", "low", "high", "sequences")
_FOLDS = {"mean": MeanFold, "max": MaxFold, "median": MedianFold}
_BLOCK_BYTES = 2**25  # float64 workspace of the column sums, so that a long sequence does not multiply memory


@dataclass(frozen=True)
class Measure:
    """One curve over depth.

    `of_sequence` gives [depth] (or [token, depth] for a median over tokens) from the quantities in `needs`;
    `fold` says how sequences are put together: their mean with a 95 % band, the largest, or the median over
    tokens with quartiles.
    """

    name: str
    title: str
    unit: str
    needs: tuple[str, ...]
    of_sequence: Callable[[Arrays, Depths], np.ndarray]
    definition: str
    fold: str = "mean"
    first: int = -1  # recurrence from which it is defined; -1: at every depth, with or without a loop


def _mean(name: str) -> Callable[[Arrays, Depths], np.ndarray]:
    def of_sequence(arrays: Arrays, depths: Depths) -> np.ndarray:
        values = arrays[name]
        return finite_mean(values, (0, 2) if values.ndim == 3 else 0)

    return of_sequence


def _relative_step(arrays: Arrays, depths: Depths) -> np.ndarray:
    return _ratio(arrays["step_norm"], arrays["residual_norm"])


def _relative_gap(arrays: Arrays, depths: Depths) -> np.ndarray:
    last_D = np.arange(len(depths))
    last_D[depths.core_RL] = depths.core_RL[-1]  # the same layer's depth at the last recurrence
    return _ratio(arrays["gap_norm"], arrays["residual_norm"][:, last_D])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(above, below, dtype=np.float64)


def _tokens_to_mean(
    of_tokens: Callable[[Arrays, Depths], np.ndarray],
) -> Callable[[Arrays, Depths], np.ndarray]:
    return lambda arrays, depths: finite_mean(of_tokens(arrays, depths), 0)


def _largest_peak(arrays: Arrays, depths: Depths) -> np.ndarray:
    peak_TD = arrays["residual_peak"]
    return np.where(np.isfinite(peak_TD), peak_TD, -np.inf).max(axis=0)


def _sink_rate(arrays: Arrays, depths: Depths) -> np.ndarray:
    score_DH = finite_mean(arrays["attention_sink"], 0)
    finite_DH = np.isfinite(score_DH)
    return _ratio(((score_DH >= SINK_SCORE) & finite_DH).sum(axis=1), finite_DH.sum(axis=1))


def _colsum_concentration(arrays: Arrays, depths: Depths) -> np.ndarray:
    received_TDH = arrays["attention_received"]
    T, D, H = received_TDH.shape
    concentration_D = np.full(D, np.nan)
    if T == 1:  # one key takes everything: neither concentrated nor spread
        return concentration_D
    block = max(1, _BLOCK_BYTES // (8 * T * H))
    for start in range(0, D, block):
        share_TDH = received_TDH[:, start : start + block].astype(np.float64) / T
        log_TDH = np.log(share_TDH, out=np.zeros_like(share_TDH), where=share_TDH > 0)
        entropy_DH = -(share_TDH * log_TDH).sum(axis=0)
        concentration_D[start : start + block] = finite_mean(1 - entropy_DH / np.log(T), 1)
    return concentration_D


def _change(name: str, scale: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays, Depths], np.ndarray]:
    """Mean over heads of `scale` of the absolute change of `name` from one recurrence to the next."""

    def of_sequence(arrays: Arrays, depths: Depths) -> np.ndarray:
        values_TDH, core_RL = arrays[name], depths.core_RL
        change_D = np.full(len(depths), np.nan)
        for before_L, now_L in pairwise(core_RL):
            change_TLH = np.abs(values_TDH[:, now_L] - values_TDH[:, before_L])
            change_D[now_L] = finite_mean(scale(change_TLH), 1)
        return change_D

    return of_sequence


_entropy_change = _change("attention_entropy", lambda change_TLH: finite_mean(change_TLH, 0))
_received_change = _change(  # total variation of the share that each key receives
    "attention_received", lambda change_TLH: change_TLH.sum(axis=0, dtype=np.float64) / (2 * len(change_TLH))
)

_RESIDUAL, _SHARE, _COSINE, _NAT = "residual units", "share of the norm", "cosine", "nat"

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("residual_norm", "Residual norm", _RESIDUAL, ("residual_norm",), _mean("residual_norm"),
                "L2 norm of the residual after the block"),
        Measure("residual_peak", "Largest channel", _RESIDUAL, ("residual_peak",), _mean("residual_peak"),
                "largest absolute channel of the residual"),
        Measure("residual_peak_max", "Largest channel anywhere", _RESIDUAL, ("residual_peak",), _largest_peak,
                "largest absolute channel of any token (massive activations)", fold="max"),
        Measure("update_norm", "Update norm", _RESIDUAL, ("update_norm",), _mean("update_norm"),
                "L2 norm of what the block added"),
        Measure("step_norm", "Step", _RESIDUAL, ("step_norm",), _mean("step_norm"),
                "distance of a layer's residual to its own one recurrence earlier", first=1),
        Measure("relative_step", "Relative step", _SHARE, ("step_norm", "residual_norm"),
                _tokens_to_mean(_relative_step), "step over the residual's norm", first=1),
        Measure("relative_step_median", "Median relative step", _SHARE, ("step_norm", "residual_norm"),
                _relative_step, "step over the residual's norm, median over tokens", fold="median", first=1),
        Measure("step_cosine", "Step cosine", _COSINE, ("step_cosine",), _mean("step_cosine"),
                "cosine of a layer's residual and its own one recurrence earlier", first=1),
        Measure("gap_norm", "Gap", _RESIDUAL, ("gap_norm",), _mean("gap_norm"),
                "distance of a layer's residual to its own after the last recurrence", first=0),
        Measure("relative_gap", "Relative gap", _SHARE, ("gap_norm", "residual_norm"),
                _tokens_to_mean(_relative_gap), "gap over the norm after the last recurrence", first=0),
        Measure("relative_gap_median", "Median relative gap", _SHARE, ("gap_norm", "residual_norm"),
                _relative_gap, "gap over the norm after the last recurrence, median over tokens",
                fold="median", first=0),
        Measure("gap_cosine", "Gap cosine", _COSINE, ("gap_cosine",), _mean("gap_cosine"),
                "cosine of a layer's residual and its own after the last recurrence", first=0),
        Measure("mixing_score", "Mixing score", _NAT, ("attention_entropy",), _mean("attention_entropy"),
                "mean entropy of attention rows over queries and heads"),
        Measure("entropy_change", "Entropy change", _NAT, ("attention_entropy",), _entropy_change,
                "mean absolute change of a row's entropy since the recurrence before", first=1),
        Measure("attention_peak", "Attention peak", "probability", ("attention_peak",),
                _mean("attention_peak"), "mean largest weight of attention rows over queries and heads"),
        Measure("sink_score", "Sink score", "probability", ("attention_sink",), _mean("attention_sink"),
                "mean attention to the first keys over queries and heads"),
        Measure("sink_rate", "Sink rate", "share of heads", ("attention_sink",), _sink_rate,
                f"share of heads whose sink score is at least {SINK_SCORE}"),
        Measure("colsum_concentration", "ColSum concentration", "of ln T", ("attention_received",),
                _colsum_concentration, "1 + sum c ln c / ln T over the share c that each of T keys receives: "
                "0 if all receive alike, 1 if one receives all"),
        Measure("received_change", "Moved attention", "share of attention", ("attention_received",),
                _received_change, "total variation of what keys receive, against the recurrence before",
                first=1),
        Measure("attention_step", "Attention step", "Frobenius norm", ("attention_step",),
                _mean("attention_step"),
                "distance of a layer's attention matrix to its own one recurrence earlier, mean over heads",
                first=1),
        Measure("attention_gap", "Attention gap", "Frobenius norm", ("attention_gap",),
                _mean("attention_gap"),
                "distance of a layer's attention matrix to its own after the last recurrence, mean of heads",
                first=0),
        Measure("residual_entropy", "Residual entropy", _NAT, ("residual_entropy",),
                _mean("residual_entropy"),
                "matrix-based entropy of a sequence's residuals: low where they point one way"),
        Measure("lens_kl", "Lens divergence", _NAT, ("lens_kl",), mean_at_loop_state("lens_kl"),
                "KL divergence of the next-token distribution from the one after the last recurrence",
                first=0),
        Measure("lens_settled", "Settled tokens", "share of tokens", ("lens_token",), settled_share,
                "share of tokens whose likeliest next token is the one after the last recurrence", first=0),
        Measure("lens_entropy", "Lens entropy", _NAT, ("lens_entropy",), mean_at_loop_state("lens_entropy"),
                "entropy of the next-token distribution", first=0),
        Measure("exit_probability", "Exit", "probability", ("exit_probability",),
                mean_at_loop_state("exit_probability"),
                "chance that the exit gate leaves after the recurrence", first=0),
    )
}  # fmt: skip


def measure(store: str | Path | xr.Dataset, names: Iterable[str] | None = None) -> xr.Dataset:
    """Measures of a store, over depth.

    Args:
        store: path of a store, or a Dataset laid out like one.
        names: keys of `MEASURES`; all that the captured quantities allow if left out.
    Returns:
        Dataset with one variable [statistic, depth] per measure (statistics: value, low, high, sequences),
        `non_finite` [quantity, depth] (values that should be numbers and are NaN or infinite; they are left
        out of every mean) and the attributes `missing` (measure -> why it is absent), `num_sequences`,
        `num_tokens`, and the store's own.
    Raises:
        ValueError: a name is not a measure.
        NothingCapturedError: no sequence is finished yet.
    """
    dataset = as_dataset(store)
    depths = depths_of(dataset)
    wanted = [_known(name) for name in (MEASURES if names is None else names)]
    missing = {each.name: why for each in wanted if (why := _why_missing(each, dataset, depths))}
    present = [each for each in wanted if each.name not in missing]
    result, bad = {}, {}
    count = _count(dataset)
    for group, quantities in _passes(present):
        values, bad_of_group = _one_pass(dataset, depths, group, quantities)
        result |= values
        bad |= bad_of_group
    variables = {
        each.name: (("statistic", "depth"), result[each.name], _attributes(each)) for each in present
    }
    captured = [name for name in QUANTITIES if name in bad]
    bad_QD = np.array([bad[name] for name in captured], np.int64).reshape(len(captured), len(depths))
    variables["non_finite"] = (("quantity", "depth"), bad_QD, {"units": "values"})
    coordinates = {name: dataset[name].variable for name in ("depth", "stage", "layer", "recurrence")}
    coordinates |= {"statistic": list(STATISTICS), "quantity": np.array(captured, dtype=str)}
    return xr.Dataset(variables, coordinates, dict(dataset.attrs) | {"missing": missing} | count)


def _known(name: str) -> Measure:
    if name not in MEASURES:
        raise ValueError(f"{name!r} is not a measure: choose from {', '.join(MEASURES)}")
    return MEASURES[name]


def _why_missing(each: Measure, dataset: xr.Dataset, depths: Depths) -> str | None:
    num_recurrences = len(depths.core_RL)
    if each.first >= 0 and num_recurrences == 0:
        return "the model has no loop"
    if each.first >= 0 and num_recurrences == 1:
        return "the loop ran once: capture with at least 2 recurrences"
    absent = [name for name in each.needs if name not in dataset]
    if "exit_probability" in absent and not dataset.attrs["plan"]["model"].get("exit_gate"):
        return "the model has no exit gate"
    if absent:
        groups = dict.fromkeys(QUANTITIES[name].group for name in absent)
        return f"needs {' and '.join(absent)}: capture again with --quantities {' '.join(groups)}"
    return None


def _count(dataset: xr.Dataset) -> dict[str, int]:
    length = dataset["sequence_length"].values
    if not (length > 0).any():
        done, total = int(dataset.attrs.get("units_done", 0)), dataset.sizes.get("unit", 0)
        raise NothingCapturedError(
            f"nothing is captured yet: {done} of {total} units are done; run the capture first, or again"
        )
    return {"num_sequences": int((length > 0).sum()), "num_tokens": int(length[length > 0].sum())}


def _attributes(each: Measure) -> dict[str, str | tuple[str, ...]]:
    return {
        "units": each.unit,
        "long_name": each.title,
        "definition": each.definition,
        "fold": each.fold,
        "needs": each.needs,
    }


def _passes(measures: list[Measure]) -> list[tuple[list[Measure], list[str]]]:
    """Measures that share a quantity are computed in one pass, so that every array is read once."""
    passes: list[tuple[list[Measure], set[str]]] = []
    for each in measures:
        together, quantities = [each], set(each.needs)
        apart = []
        for other, others in passes:
            if others & quantities:
                together, quantities = other + together, quantities | others
            else:
                apart.append((other, others))
        passes = [*apart, (together, quantities)]
    return [(group, sorted(quantities)) for group, quantities in passes]


def _one_pass(
    dataset: xr.Dataset, depths: Depths, group: list[Measure], quantities: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    folds = {each.name: _FOLDS[each.fold](len(depths)) for each in group}
    bad = {name: np.zeros(len(depths), np.int64) for name in quantities}
    for arrays in iter_sequences(dataset, quantities):
        for name, values in arrays.items():
            bad[name] += _non_finite(name, values, depths)
        for each in group:
            folds[each.name].add(each.of_sequence(arrays, depths))
    return {name: fold.result() for name, fold in folds.items()}, bad


def _non_finite(name: str, values: np.ndarray, depths: Depths) -> np.ndarray:
    wrong_D = (~np.isfinite(values)).sum(axis=(0, 2) if values.ndim == 3 else 0)
    if "recurrence" in QUANTITIES[name].axes:
        return np.nan_to_num(to_depths(wrong_D, depths)).astype(np.int64)
    return np.where(depths.recurrence >= QUANTITIES[name].first_recurrence, wrong_D, 0)
