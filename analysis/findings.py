"""Everything measured in one capture, under the label that figures and tables show it by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import xarray as xr

from ..capture.store.plan import StoredPlan, plan_of
from ..errors import CannotTellError, NothingCapturedError
from .answers.feedforward import Reference, choose_reference
from .answers.stages import STAGE_MEASURES, gathered
from .depth_axis import Depths, depths_of, loops_apart
from .depth_tables import depth_table
from .measures import MEASURES, as_analyses, assembled
from .registry import ANALYSES
from .streaming import as_dataset
from .trained import trained_count
from .verdicts import Verdict, verdicts
from .walk import walk

TIMES = "\N{MULTIPLICATION SIGN}"
_SMALLEST = 1e-30  # stands for the lower end of a band that reaches zero or less, on a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was measured in one capture; a text says why an answer is missing."""

    label: str
    measures: xr.Dataset
    verdicts: list[Verdict]
    answers: Mapping[str, xr.Dataset | str] = field(default_factory=dict)
    """answers by name of the analysis, or why there is none"""
    stages: xr.Dataset | str = "not asked"
    """agreement of each recurrence's stages with the last one's, as `stage_agreement` returns it"""
    reference: xr.Dataset | str = "not asked"
    """agreement of the stages with a feedforward model's, if a capture of one was given"""

    @cached_property
    def plan(self) -> StoredPlan:
        return plan_of(self.measures)

    @property
    def depths(self) -> Depths:
        return depths_of(self.measures)

    @cached_property
    def by_depth(self) -> pd.DataFrame:
        """The table that figures draw from: `depth_table` with bands that a logarithmic axis can show."""
        table = depth_table(self.measures)
        for name, about in MEASURES.items():
            if about.log and name in table:
                low = table[f"{name}_low"]
                table[f"{name}_low"] = low.where(~(low <= 0), _SMALLEST)
        return table

    @property
    def loop(self) -> str:
        """Name of the loop that this is about, if the capture has several."""
        return self.measures.attrs.get("loop", "")

    @property
    def units(self) -> tuple[int, int]:
        """Numbers of units: those done, and those in the plan."""
        total = self.plan.num_units
        return self.measures.attrs.get("units_done", total), total


def find(stores: Sequence[str | Path | xr.Dataset]) -> list[Findings]:
    """Measures and analyses every store, in one walk each, labelled so that no two captures share a label.

    Returns:
        one for each store; of a store with several loops one for each loop, the others being outside of it.
    Raises:
        NothingCapturedError: a store has no finished sequence; the message names it.
    """
    datasets = [each for store in stores for each in loops_apart(as_dataset(store))]
    plans = [plan_of(dataset) for dataset in datasets]
    labels = make_labels(plans, [dataset.attrs.get("loop", "") for dataset in datasets])
    found = dict[int, Findings]()
    for index in sorted(range(len(plans)), key=lambda index: plans[index].model.core > 0):
        plain = [(each.label, each.measures) for each in found.values() if not each.plan.model.core]
        reference = choose_reference(plans[index], plain)
        trained = trained_count(plans[index], plans)
        found[index] = _find_one(datasets[index], labels[index], trained, reference)
    return [found[index] for index in range(len(plans))]


def _find_one(dataset: xr.Dataset, label: str, trained: int | str, reference: Reference | str) -> Findings:
    asked = [*as_analyses(), *ANALYSES.values()]
    if isinstance(reference, Reference):
        asked += reference.analyses()
    try:
        walked = walk(dataset, asked)
    except NothingCapturedError as error:
        raise NothingCapturedError(f"{label}: {error}") from error
    measures, answers = assembled(dataset, walked), {name: walked[name] for name in ANALYSES}
    if isinstance(reference, Reference):
        num_layers = depths_of(dataset).core_RL.shape[1]
        beside = _or_reason(partial(reference.gathered, walked, num_layers))
    else:
        beside = reference
    return Findings(
        label=label,
        measures=measures,
        answers=answers,
        stages=_or_reason(partial(gathered, STAGE_MEASURES, walked)),
        reference=beside,
        verdicts=verdicts(measures, answers["distinctness"], answers, trained, beside),
    )


def _or_reason(gather: Callable[[], xr.Dataset]) -> xr.Dataset | str:
    try:
        return gather()
    except CannotTellError as error:
        return str(error)


def make_labels(plans: Sequence[StoredPlan], loops: Sequence[str] = ()) -> list[str]:
    """Makes short labels: the model's name and notation and what else tells captures apart, or a number.

    Args:
        plans: one a capture.
        loops: name of the loop where a capture is of one of several, else empty; all empty if left out.
    """
    if not plans:
        return []
    always, extra, last = zip(*map(_label_parts, plans), strict=True)
    labels = list(always)
    for column in (loops or [""] * len(plans), *zip(*extra, strict=True)):
        if len(set(labels)) < len(labels) and len(set(column)) > 1:
            labels = [f"{label} {part}".rstrip() for label, part in zip(labels, column, strict=True)]
    labels = [
        f"{label} {tail}" if labels.count(label) > 1 else label
        for label, tail in zip(labels, last, strict=True)
    ]
    return [
        f"{label} [{index + 1}]" if labels.count(label) > 1 else label for index, label in enumerate(labels)
    ]


def _label_parts(plan: StoredPlan) -> tuple[str, tuple[str, ...], str]:
    """Returns what every label shows, what it adds if captures differ, and what if that is not enough."""
    model, settings = plan.model, plan.settings
    short = "random" if model.is_random else model.name.rstrip("/").rsplit("/", 1)[-1]
    norm = f"{model.norm}-norm" if model.norm == "pre" else f"{model.norm} norms"
    extra = (norm, f"width {model.width}", plan.data.name, settings.dtype)
    options = (model.spec or model.name).rpartition(")")[2].lstrip("I,")
    tail = options if model.is_random else f"seed {settings.seed}"
    return f"{short} {model.notation.replace('x', TIMES)}", extra, tail
