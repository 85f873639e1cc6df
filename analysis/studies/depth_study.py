"""One checkpoint at many test-time recurrence counts: what its stages, its last step and its output become.

Takes the stores of `looptap study depth`, one a count. A count's own store says what the coda made of it;
everything is held against the model's own count.

Source: arXiv 2604.11791, section 5.2 (figures 11, 12, 47 to 52). Which measures stand for "stable" is our
reading; so are the output's cosine and the share of equal answers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from ...capture.store.plan import plan_of
from ...errors import StudyError
from ..depth_axis import Depths, depths_of, stages_of
from ..folds import STATISTICS, MeanFold, finite_mean
from ..measures import MEASURES, measure
from ..streaming import Arrays, as_dataset, iter_sequences
from ..verdicts import worst_over_layers

PLACE_MEASURES = ("mixing_score", "sink_rate", "colsum_concentration", "residual_norm")


class End(NamedTuple):
    """A number that is read at the end of every count."""

    title: str
    unit: str
    definition: str
    log: bool = False
    """it spans decades"""


ENDS = {
    "output_cosine": End(
        "Output cosine",
        "cosine",
        "between what the last block leaves and what it leaves at the model's own count, mean over tokens",
    ),
    "same_answer": End(
        "Same answer",
        "share of tokens",
        "tokens whose likeliest next one, read from the last loop state, is that at the model's own count",
    ),
    "lens_entropy": End(
        "Lens entropy",
        "nat",
        "of the next-token distribution read from the last loop state, mean over tokens",
    ),
    "last_step": End(
        "Last step",
        "share of the norm",
        "median over tokens of the last recurrence's step over the residual's norm, in the slowest layer",
        log=True,
    ),
}
_NEEDS = ("state", "lens_token", "lens_entropy")


def depth_study(stores: Sequence[str | Path | xr.Dataset], own: int) -> xr.Dataset:
    """Compares what a checkpoint does at different recurrence counts.

    Args:
        stores: captures of one model and data at different counts, with the last block's state.
        own: the model's own count; one of the stores is of it.
    Returns:
        Dataset with `PLACE_MEASURES` [count, statistic, place] (places: the prelude's layers, the core's in
        the last recurrence, the coda's) and `ENDS` [count, statistic]; statistics: value, low, high,
        sequences. The last step is a median and has no band. Attributes: those of the largest count's
        measures, and `own`.
    Raises:
        StudyError: units are missing, stores differ in more than the count, or none has the own one.
    """
    datasets = sorted((as_dataset(store) for store in stores), key=_count)
    counts = [_count(dataset) for dataset in datasets]
    _check(datasets, counts, own)
    measured = [measure(dataset, (*PLACE_MEASURES, "relative_step_median")) for dataset in datasets]
    places = [_places(depths_of(each)) for each in measured]
    variables: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]] = {
        name: (
            ("count", "statistic", "place"),
            np.stack([each[name].values[:, at] for each, at in zip(measured, places, strict=True)]),
            _attributes(MEASURES[name].title, MEASURES[name].unit, MEASURES[name].definition),
        )
        for name in PLACE_MEASURES
    }
    ends = _ends(datasets, counts.index(own)) | {
        "last_step": np.stack([_last_step(each) for each in measured])
    }
    for name, values in ends.items():
        variables[name] = (("count", "statistic"), values, _attributes(*ENDS[name][:3]))
    largest = measured[-1]
    coordinates = {
        name: ("place", largest[name].values[places[-1]], largest[name].attrs) for name in ("stage", "layer")
    }
    coordinates |= {"count": counts, "statistic": list(STATISTICS)}
    return xr.Dataset(variables, coordinates, dict(largest.attrs) | {"own": own})


def study_tables(study: xr.Dataset) -> dict[str, pd.DataFrame]:
    """`counts`, a row a count: what is read at its end; `places`, a row a count and place: measures there."""
    by_count = {"recurrences": study["count"].values, "is_own": study["count"].values == study.attrs["own"]}
    for name in ENDS:
        by_count |= _with_band(name, study[name].values)
    stages, C, P = stages_of(study), study.sizes["count"], study.sizes["place"]
    by_place = {
        "recurrences": np.repeat(study["count"].values, P),
        "place": np.tile(np.arange(P), C),
        "stage": np.tile([stages[stage] for stage in study["stage"].values], C),
        "layer": np.tile(study["layer"].values, C),
    }
    for name in PLACE_MEASURES:
        by_place |= _with_band(name, study[name].values.swapaxes(1, 2).reshape(C * P, -1))
    return {"counts": pd.DataFrame(by_count), "places": pd.DataFrame(by_place)}


def _with_band(name: str, values_RS: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{name}{end}": values_RS[:, index] for index, end in enumerate(("", "_low", "_high"))}


def _attributes(title: str, unit: str, definition: str) -> dict[str, str]:
    return {"long_name": title, "units": unit, "definition": definition}


def _count(dataset: xr.Dataset) -> int:
    return plan_of(dataset).model.recurrences


def _check(datasets: Sequence[xr.Dataset], counts: Sequence[int], own: int) -> None:
    if own not in counts:
        held = ", ".join(map(str, counts)) or "none"
        raise StudyError(f"no capture of the model's own {own} recurrences is among the counts {held}")
    if len(set(counts)) < len(counts):
        raise StudyError(f"two captures of one count are among {', '.join(map(str, counts))}")
    first = _identity(datasets[0])
    for dataset, count in zip(datasets, counts, strict=True):
        missing = int((dataset["unit_done"].values == 0).sum())
        if missing:
            raise StudyError(
                f"{missing} units of {count} recurrences are missing: run the study again, it goes on"
            )
        if absent := [name for name in _NEEDS if name not in dataset]:
            raise StudyError(f"the capture of {count} recurrences lacks {' and '.join(absent)}")
        for name, value in _identity(dataset).items():
            if value != first[name]:
                raise StudyError(f"{name} differs between {counts[0]} and {count} recurrences")


def _identity(dataset: xr.Dataset) -> dict[str, object]:
    """Returns what all captures of a study have in common."""
    plan = plan_of(dataset)
    model = plan.model
    return {
        "the data": plan.data,
        "the model": (model.weights_sha256, model.norm, model.prelude, model.core, model.coda),
        "dtype": plan.dtype,
        "the seed": plan.settings.seed,
    }


def _places(depths: Depths) -> np.ndarray:
    """Depth of every block in its last invocation, in the order they run."""
    is_last_D = np.ones(len(depths), bool)
    for loop_RL in depths.loops:
        is_last_D[loop_RL[:-1]] = False
    return np.flatnonzero(is_last_D)


def _last_step(measured: xr.Dataset) -> np.ndarray:
    """Returns the last step's measure, [statistic]; undefined if the loop ran once."""
    step_S = np.full(len(STATISTICS), np.nan)
    if "relative_step_median" in measured:
        median_D = measured["relative_step_median"].sel(statistic="value").values
        step_S[0] = worst_over_layers(median_D, depths_of(measured))[-1]
        step_S[-1] = measured.attrs["num_sequences"]
    return step_S


def _ends(datasets: Sequence[xr.Dataset], own: int) -> dict[str, np.ndarray]:
    """Returns each end as [count, statistic]; all stores are read side by side, a unit of each in memory."""
    folds = {name: MeanFold(len(datasets)) for name in ("output_cosine", "same_answer", "lens_entropy")}
    for together in zip(*(iter_sequences(each, list(_NEEDS)) for each in datasets), strict=True):
        for name, fold in folds.items():
            fold.add(np.array([_of_sequence(name, arrays, together[own]) for arrays in together]))
    return {name: fold.result().T for name, fold in folds.items()}


def _of_sequence(name: str, here: Arrays, own: Arrays) -> float:
    if name == "lens_entropy":
        return float(finite_mean(here[name][:, -1], 0))
    if name == "same_answer":
        return float((here["lens_token"][:, -1] == own["lens_token"][:, -1]).mean())
    cosines = []
    for a_T1D, b_T1D in zip(_states(here), _states(own), strict=True):
        a_TD, b_TD = a_T1D[:, 0].astype(np.float64), b_T1D[:, 0].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines.append((a_TD * b_TD).sum(1) / np.sqrt((a_TD**2).sum(1) * (b_TD**2).sum(1)))
    return float(finite_mean(np.concatenate(cosines), 0))


def _states(arrays: Arrays) -> Iterator[np.ndarray]:
    assert arrays.states is not None  # checked with the stores
    return arrays.states.blocks(slice(0, 1))
