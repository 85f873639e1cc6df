"""The paper's measures by depth: one table of what each is, and one function that computes them from a store.

A measure turns the captured quantities of one sequence into a value per depth; `measure` walks the store
with all of them and folds the sequences. What was not captured is named, with what to capture.

Source: arXiv 2604.11791, sections 3 and 4 and appendix B.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from ..capture.store.quantities import QUANTITIES
from ..errors import UnfitError
from . import by_head
from .depth_axis import Depths
from .folds import STATISTICS, MaxFold, MeanFold, MedianFold, finite_mean, ratio
from .loop_state import mean_at_loop_state, settled_share, to_depths
from .streaming import Arrays, as_dataset
from .walk import Analysis, count_captured, walk

SINK_SCORE = (
    0.3  # a head whose mean mass on the first key reaches this counts as a sink head, as in the paper
)
_FOLDS = {"mean": MeanFold, "max": MaxFold, "median": MedianFold}


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
    log: bool = False  # spans decades, as distances, changes, norms and largest channels do

    def curve(self, arrays: Arrays, depths: Depths) -> np.ndarray:
        """Returns what `of_sequence` gives, computed once for all analyses of a walk."""
        return arrays.once(self.name, lambda: self.of_sequence(arrays, depths))


def _mean(name: str) -> Callable[[Arrays, Depths], np.ndarray]:
    def of_sequence(arrays: Arrays, depths: Depths) -> np.ndarray:
        values = arrays[name]
        return finite_mean(values, (0, 2) if values.ndim == 3 else 0)

    return of_sequence


def _relative_step(arrays: Arrays, depths: Depths) -> np.ndarray:
    return ratio(arrays["step_norm"], arrays["residual_norm"])


def _relative_gap(arrays: Arrays, depths: Depths) -> np.ndarray:
    last_D = np.arange(len(depths))
    for loop_RL in depths.loops:
        last_D[loop_RL] = loop_RL[-1]  # the same layer's depth at the last recurrence
    return ratio(arrays["gap_norm"], arrays["residual_norm"][:, last_D])


def _tokens_to_mean(
    of_tokens: Callable[[Arrays, Depths], np.ndarray],
) -> Callable[[Arrays, Depths], np.ndarray]:
    return lambda arrays, depths: finite_mean(of_tokens(arrays, depths), 0)


def _largest_peak(arrays: Arrays, depths: Depths) -> np.ndarray:
    peak_TD = arrays["residual_peak"]
    return np.where(np.isfinite(peak_TD), peak_TD, -np.inf).max(axis=0)


def _sink_rate(arrays: Arrays, depths: Depths) -> np.ndarray:
    score_DH = by_head.mean(arrays, "attention_sink")
    finite_DH = np.isfinite(score_DH)
    return ratio(((score_DH >= SINK_SCORE) & finite_DH).sum(axis=1), finite_DH.sum(axis=1))


def _colsum_concentration(arrays: Arrays, depths: Depths) -> np.ndarray:
    return finite_mean(by_head.concentration(arrays), 1)


def _entropy_change(arrays: Arrays, depths: Depths) -> np.ndarray:
    return finite_mean(by_head.entropy_change(arrays, depths), 1)


def _received_change(arrays: Arrays, depths: Depths) -> np.ndarray:
    """Total variation of the share that each key receives, from one recurrence to the next, mean of heads."""
    change_D = np.full(len(depths), np.nan)
    for later, change_TCH in by_head.changes(arrays["attention_received"], depths):
        moved_CH = change_TCH.sum(axis=0, dtype=np.float64) / (2 * len(change_TCH))
        change_D[later] = finite_mean(moved_CH, 1)
    return change_D


_RESIDUAL, _SHARE, _COSINE, _NAT = "residual units", "share of the norm", "cosine", "nat"

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("residual_norm", "Residual norm", _RESIDUAL, ("residual_norm",), _mean("residual_norm"),
                "L2 norm of the residual after the block", log=True),
        Measure("residual_peak", "Largest channel", _RESIDUAL, ("residual_peak",), _mean("residual_peak"),
                "largest absolute channel of the residual", log=True),
        Measure("residual_peak_max", "Largest channel anywhere", _RESIDUAL, ("residual_peak",), _largest_peak,
                "largest absolute channel of any token (massive activations)", fold="max", log=True),
        Measure("update_norm", "Update norm", _RESIDUAL, ("update_norm",), _mean("update_norm"),
                "L2 norm of what the block added"),
        Measure("step_norm", "Step", _RESIDUAL, ("step_norm",), _mean("step_norm"),
                "distance of a layer's residual to its own one recurrence earlier", first=1, log=True),
        Measure("relative_step", "Relative step", _SHARE, ("step_norm", "residual_norm"),
                _tokens_to_mean(_relative_step), "step over the residual's norm", first=1, log=True),
        Measure("relative_step_median", "Median relative step", _SHARE, ("step_norm", "residual_norm"),
                _relative_step, "step over the residual's norm, median over tokens",
                fold="median", first=1, log=True),
        Measure("step_cosine", "Step cosine", _COSINE, ("step_cosine",), _mean("step_cosine"),
                "cosine of a layer's residual and its own one recurrence earlier", first=1),
        Measure("gap_norm", "Gap", _RESIDUAL, ("gap_norm",), _mean("gap_norm"),
                "distance of a layer's residual to its own after the last recurrence", first=0, log=True),
        Measure("relative_gap", "Relative gap", _SHARE, ("gap_norm", "residual_norm"),
                _tokens_to_mean(_relative_gap), "gap over the norm after the last recurrence",
                first=0, log=True),
        Measure("relative_gap_median", "Median relative gap", _SHARE, ("gap_norm", "residual_norm"),
                _relative_gap, "gap over the norm after the last recurrence, median over tokens",
                fold="median", first=0, log=True),
        Measure("gap_cosine", "Gap cosine", _COSINE, ("gap_cosine",), _mean("gap_cosine"),
                "cosine of a layer's residual and its own after the last recurrence", first=0),
        Measure("mixing_score", "Mixing score", _NAT, ("attention_entropy",), _mean("attention_entropy"),
                "mean entropy of attention rows over queries and heads"),
        Measure("entropy_change", "Entropy change", _NAT, ("attention_entropy",), _entropy_change,
                "mean absolute change of a row's entropy since the recurrence before", first=1, log=True),
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
                first=1, log=True),
        Measure("attention_step", "Attention step", "Frobenius norm", ("attention_step",),
                _mean("attention_step"),
                "distance of a layer's attention matrix to its own one recurrence earlier, mean over heads",
                first=1, log=True),
        Measure("attention_gap", "Attention gap", "Frobenius norm", ("attention_gap",),
                _mean("attention_gap"),
                "distance of a layer's attention matrix to its own after the last recurrence, mean of heads",
                first=0, log=True),
        Measure("residual_entropy", "Residual entropy", _NAT, ("residual_entropy",),
                _mean("residual_entropy"),
                "matrix-based entropy of a sequence's residuals: low where they point one way"),
        Measure("lens_kl", "Lens divergence", _NAT, ("lens_kl",), mean_at_loop_state("lens_kl"),
                "KL divergence of the next-token distribution from the one after the last recurrence",
                first=0, log=True),
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
    """Computes measures of a store, over depth.

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
    return assembled(dataset, walk(dataset, as_analyses(names)))


def as_analyses(names: Iterable[str] | None = None) -> list[Analysis]:
    """Returns analyses of measures, all or those named, and of the count of bad values, for a walk."""
    wanted = [_known(name) for name in (MEASURES if names is None else names)]
    quantities = dict.fromkeys(name for each in wanted for name in each.needs)
    counts = [
        Analysis(f"non_finite:{name}", "Values that are no numbers", (name,), "", partial(_BadFold, name))
        for name in quantities
    ]
    measures = [
        Analysis(each.name, each.title, each.needs, each.definition, partial(_MeasureFold, each), each.first)
        for each in wanted
    ]
    return measures + counts


def assembled(dataset: xr.Dataset, answers: Mapping[str, xr.Dataset | str]) -> xr.Dataset:
    """Assembles the Dataset that `measure` returns from the answers of a walk with `as_analyses`."""
    variables, missing, bad = {}, {}, {}
    for name in MEASURES:
        found = answers.get(name)
        if isinstance(found, str):
            missing[name] = found
        elif found is not None:
            variables[name] = found[name].variable
    needed = {name for measure in variables for name in MEASURES[measure].needs}
    for name in QUANTITIES:
        found = answers.get(f"non_finite:{name}")
        if name in needed and isinstance(found, xr.Dataset):
            bad[name] = found["non_finite"].values
    bad_QD = np.array(list(bad.values()), np.int64).reshape(len(bad), dataset.sizes["depth"])
    variables["non_finite"] = (("quantity", "depth"), bad_QD, {"units": "values"})
    coordinates = {name: dataset[name].variable for name in ("depth", "stage", "layer", "recurrence")}
    coordinates |= {"statistic": list(STATISTICS), "quantity": np.array(list(bad), dtype=str)}
    attributes = dict(dataset.attrs) | {"missing": missing} | count_captured(dataset)
    return xr.Dataset(variables, coordinates, attributes)


def _known(name: str) -> Measure:
    if name not in MEASURES:
        raise UnfitError(f"{name!r} is not a measure: choose from {', '.join(MEASURES)}")
    return MEASURES[name]


class _MeasureFold:
    """One measure, folded over sequences."""

    def __init__(self, each: Measure, dataset: xr.Dataset, depths: Depths) -> None:
        self._each, self._depths = each, depths
        self._fold = _FOLDS[each.fold](len(depths))

    def add(self, arrays: Arrays) -> None:
        self._fold.add(self._each.curve(arrays, self._depths))

    def result(self) -> xr.Dataset:
        each = self._each
        about = {"units": each.unit, "long_name": each.title, "definition": each.definition}
        about |= {"fold": each.fold, "needs": each.needs}
        return xr.Dataset({each.name: (("statistic", "depth"), self._fold.result(), about)})


class _BadFold:
    """Counts values of a quantity that should be numbers and are not, by depth."""

    def __init__(self, name: str, dataset: xr.Dataset, depths: Depths) -> None:
        self._name, self._depths = name, depths
        self._bad_D = np.zeros(len(depths), np.int64)

    def add(self, arrays: Arrays) -> None:
        self._bad_D += _non_finite(self._name, arrays[self._name], self._depths)

    def result(self) -> xr.Dataset:
        return xr.Dataset({"non_finite": ("depth", self._bad_D)})


def _non_finite(name: str, values: np.ndarray, depths: Depths) -> np.ndarray:
    wrong_D = (~np.isfinite(values)).sum(axis=0)
    wrong_D = wrong_D.sum(axis=1) if wrong_D.ndim == 2 else wrong_D
    if "recurrence" in QUANTITIES[name].axes:
        return np.nan_to_num(to_depths(wrong_D, depths)).astype(np.int64)
    return np.where(depths.recurrence >= QUANTITIES[name].first_recurrence, wrong_D, 0)
