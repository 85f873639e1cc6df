"""The feedforward model that a loop's stages are held against, when a capture of one stands beside it.

A model whose layers were made a loop without training is held against the same layers of itself; any other
against all layers of the feedforward model, at the same relative depth.

Source: arXiv 2604.11791, section 4.3, whose claim is that every recurrence mirrors a feedforward model's
stages. Which layers are held against which is our reading.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ...capture.store.plan import StoredPlan, plan_of
from ..trained import same_weights
from ..walk import Analysis
from .stages import STAGE_MEASURES, gathered, reference_profiles, resampled, stages_of


@dataclass(frozen=True)
class Reference:
    """A feedforward capture's mean profiles."""

    label: str
    profiles: Mapping[str, np.ndarray]
    """mean profiles by measure, [layer]"""
    missing: Mapping[str, str]
    """measure -> why it has no profile"""
    layers: str
    """names of these layers, in words"""

    def analyses(self) -> list[Analysis]:
        """Returns the analyses to ask of the looped capture's walk."""
        return [stages_of(name, profile) for name, profile in self.profiles.items()]

    def gathered(self, answers: Mapping[str, xr.Dataset | str], num_layers: int) -> xr.Dataset:
        """Returns what the walk found, as `stage_agreement` does.

        Args:
            num_layers: number of the core's layers.
        Returns:
            with `profile` [measure, layer], the reference's at the core's layers, and the attributes
            `reference` and `layers`, which say what was compared with.
        Raises:
            CannotTellError: no measure could be compared.
        """
        found = gathered(STAGE_MEASURES, answers, self.missing, "reference")
        profiles = [self.profiles[str(name)] for name in found["measure"].values]
        profile_ML = np.stack([resampled(each, num_layers) for each in profiles])
        found = found.assign(profile=(("measure", "layer"), profile_ML))
        return found.assign_attrs(reference=self.label, layers=self.layers)


def choose_reference(plan: StoredPlan, plain: Sequence[tuple[str, xr.Dataset]]) -> Reference | str:
    """Returns the feedforward capture over the same data to compare a loop with, or why there is none.

    Args:
        plan: plan of the looped capture.
        plain: labels and measures of the feedforward captures beside it. One of the same weights is chosen
            before others, then the first.
    """
    if not plan.model.core:
        return "the model has no loop"
    if not plain:
        return "no capture of a feedforward model stands beside it"
    fitting = [each for each in plain if plan_of(each[1]).data == plan.data]
    if not fitting:
        return f"{plain[0][0]} was captured over other data"
    own = [each for each in fitting if same_weights(plan_of(each[1]), plan)]
    label, curves = (own or fitting)[0]
    window = re.match(r"(\d+)-(\d+)x", plan.settings.loop or "") if own else None
    layers, words = slice(None), "all its layers"
    if window is not None:
        first, last = int(window[1]), int(window[2])
        layers, words = slice(first, last + 1), f"the same layers of itself, {first} to {last}"
    return Reference(label, *reference_profiles(curves, STAGE_MEASURES, layers), words)
