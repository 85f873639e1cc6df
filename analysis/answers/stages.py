"""Whether recurrences repeat the stages of inference: their profiles over layers, beside a reference's.

A profile is a measure's values over the layers that one recurrence runs. It is compared with a reference by
its correlation, which is about shape, and by its distance, which is about level. Without a reference model
each sequence's own last recurrence is the reference.

Source: arXiv 2604.11791, section 4.3 and figures 7, 8 and 32; the numbers are our reading of what the paper
shows by eye.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from ...errors import CannotTellError, UnfitError
from ..depth_axis import Depths
from ..folds import STATISTICS, MeanFold
from ..measures import MEASURES, measure
from ..streaming import Arrays
from ..walk import Analysis, walk

STAGE_MEASURES = ("mixing_score", "sink_score", "colsum_concentration", "residual_norm")
LEAST_LAYERS = 4  # fewer points correlate by chance
_FURTHEST = 1 - 1e-12  # a correlation's Fisher z stays finite


def resampled(profile_L: np.ndarray, num_layers: int) -> np.ndarray:
    """Resamples a profile to another number of layers, linear in relative depth (middles of the layers)."""
    old, new = ((np.arange(n) + 0.5) / n for n in (len(profile_L), num_layers))
    return np.interp(new, old, profile_L)


def agreement(profile_RL: np.ndarray, reference_L: np.ndarray) -> np.ndarray:
    """Correlation (Pearson's) of each profile with a reference, and its distance.

    Returns:
        float64 [2, recurrence]: the correlation, NaN where either is flat; and the root mean square
        difference as a share of the reference's range, NaN where that is 0.
    """
    profile_RL, reference_L = profile_RL.astype(np.float64), reference_L.astype(np.float64)
    a_RL = profile_RL - profile_RL.mean(axis=1, keepdims=True)
    b_L = reference_L - reference_L.mean()
    scale_R = np.sqrt((a_RL**2).sum(axis=1) * (b_L**2).sum())
    far_R = np.sqrt(((profile_RL - reference_L) ** 2).mean(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([np.clip(a_RL @ b_L / scale_R, -1, 1), far_R / np.ptp(reference_L)])


class _StagesFold:
    """Agreement of one measure's profiles; correlations are averaged over sequences as Fisher's z."""

    def __init__(
        self, name: str, reference_L: np.ndarray | None, dataset: xr.Dataset, depths: Depths
    ) -> None:
        R, L = depths.core_RL.shape
        if L < LEAST_LAYERS:
            raise CannotTellError(f"the core has {L} layers: a profile to compare takes {LEAST_LAYERS}")
        self._measure, self._depths = MEASURES[name], depths
        self._reference_L = None if reference_L is None else resampled(reference_L, L)
        self._z, self._far = MeanFold(R), MeanFold(R)

    def add(self, arrays: Arrays) -> None:
        profile_RL = self._measure.curve(arrays, self._depths)[self._depths.core_RL]
        reference_L = profile_RL[-1] if self._reference_L is None else self._reference_L
        correlation_R, far_R = agreement(profile_RL, reference_L)
        self._z.add(np.arctanh(np.clip(correlation_R, -_FURTHEST, _FURTHEST)))
        self._far.add(far_R)

    def result(self) -> xr.Dataset:
        correlation = self._z.result()
        correlation[:3] = np.tanh(correlation[:3])
        axes = ("statistic", "recurrence")
        return xr.Dataset(
            {
                "correlation": (axes, correlation, {"units": "correlation"}),
                "distance": (axes, self._far.result(), {"units": "share of the reference's range"}),
            },
            {"statistic": list(STATISTICS), "recurrence": np.arange(correlation.shape[1])},
        )


def stages_of(name: str, reference_L: np.ndarray | None = None) -> Analysis:
    """Makes the analysis of a measure, against a reference's profile or a sequence's last recurrence."""
    kind, beside = ("stages", "the sequence's own last recurrence")
    if reference_L is not None:
        kind, beside = ("reference", "a reference model")
    return Analysis(
        f"{kind}_{name}",
        f"Stages of {MEASURES[name].title.lower()}",
        MEASURES[name].needs,
        f"correlation and distance of each recurrence's {MEASURES[name].title.lower()} over layers with "
        f"{beside}; correlations are averaged over sequences as Fisher's z",
        partial(_StagesFold, name, reference_L),
        first=0,
    )


ANALYSES = [stages_of(name) for name in STAGE_MEASURES]


def stage_agreement(
    store: str | Path | xr.Dataset,
    reference: str | Path | xr.Dataset | None = None,
    measures: Iterable[str] = STAGE_MEASURES,
    layers: slice | None = None,
) -> xr.Dataset:
    """Agreement of every recurrence's stages with a reference model's, or with the last recurrence's.

    Args:
        store: a looped model's capture.
        reference: another capture, such as the feedforward model's over the same data: the mean profile of
            all its block invocations, resampled to the core's layers. Its loop, if any, is part of the depth.
        measures: curves of `MEASURES` to compare.
        layers: only these block invocations of the reference, such as those that a loop was made of.
    Returns:
        Dataset: `correlation` and `distance` [measure, statistic, recurrence], with the 95 % band over
        sequences; attribute `missing` (measure -> why it is absent).
    Raises:
        UnfitError: a name is not a measure.
        CannotTellError: no measure can be compared; the message says why.
        NothingCapturedError: no sequence is finished yet.
    """
    names = list(measures)
    profiles: dict[str, np.ndarray | None] = dict.fromkeys(names)
    missing: dict[str, str] = {}
    if reference is not None:
        held, missing = reference_profiles(measure(reference, names), names, layers)
        profiles = dict[str, np.ndarray | None](held)
    elif unknown := [name for name in names if name not in MEASURES]:
        raise UnfitError(f"{unknown[0]!r} is not a measure: choose from {', '.join(MEASURES)}")
    asked = [stages_of(name, profile) for name, profile in profiles.items()]
    kind = "stages" if reference is None else "reference"
    return gathered(names, walk(store, asked), missing, kind)


def reference_profiles(
    curves: xr.Dataset, names: Iterable[str], layers: slice | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the mean profiles [depth] of a reference's measures, and why others are missing."""
    names = list(names)
    missing = {
        name: f"in the reference: {why}" for name, why in curves.attrs["missing"].items() if name in names
    }
    held = [name for name in names if name not in missing]
    span = slice(None) if layers is None else layers
    return {name: curves[name].sel(statistic="value").values[span] for name in held}, missing


def gathered(
    names: Sequence[str],
    answers: Mapping[str, xr.Dataset | str],
    missing: Mapping[str, str] | None = None,
    kind: str = "stages",
) -> xr.Dataset:
    """Returns what a walk found of several measures' stages, as `stage_agreement` does."""
    missing, found = dict(missing or {}), {}
    for name in names:
        each = answers.get(f"{kind}_{name}", "")
        if isinstance(each, xr.Dataset):
            found[name] = each
        elif each:
            missing[name] = each
    if not found:
        raise CannotTellError("; ".join(dict.fromkeys(missing.values())) or "no measure was named")
    together = xr.concat(list(found.values()), "measure", combine_attrs="drop")
    return together.assign_coords(measure=list(found)).assign_attrs(missing=missing)
