"""The architecture study: randomly initialised loops of every combination of norms, injection and layers,
and of the scales at which they stop converging (arXiv 2604.11791, section 4.2).

Every combination and seed is an ordinary capture into a store of its own, whose name says which one it is, so
that studies in one directory share what they have in common.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path
from typing import Any

from ...errors import NoRoomError, OtherPlanError, PlanError
from ..data import Dataset, read_dataset
from ..plan import Plan, make_plan
from ..plan_cost import disk_bytes
from ..run import Outcome
from ..settings import (
    ArchitectureStudySettings,
    CaptureSettings,
    DataSettings,
    MeasureSettings,
    ModelSettings,
    RunSettings,
)
from ..store.cell import Cell
from ..store.group import store_exists
from ..store.places.open import open_place
from ..store.plan import plan_differences
from ..store.writing.commit import Store
from ..tokenizer import BYTES
from ..units import DEFAULT_UNIT_TOKENS

QUANTITIES = ("residual", "steps", "gaps")
STATES = "core[all]@last"  # whether layers have points of their own


@dataclass(frozen=True)
class ArchitectureStudy:
    """The stores of an architecture study."""

    stores: tuple[Path, ...]
    """Paths of the stores, in the order of the axes' product."""
    complete: bool


def run_architecture_study(
    settings: ArchitectureStudySettings, run_all: Callable[[Sequence[Plan]], Sequence[Outcome]]
) -> ArchitectureStudy:
    """Captures what is not there yet.

    Args:
        run_all: ordinary captures one after another, such as `run_all_with_progress`.
    Raises:
        as `make_plan` and `prepare_store`: every plan is made and held against what is on disk before
        anything runs; PlanError: an axis is empty or has a value twice, a width does not fit the head width,
        a loop runs less than twice, or the disk has too little room.
    """
    plans = architecture_plans(settings)
    _check_stores(plans, settings.out)
    outcomes = run_all(plans)
    stores = tuple(Path(plan.store) for plan in plans)
    return ArchitectureStudy(stores, all(outcome.complete for outcome in outcomes))


def cells_of(settings: ArchitectureStudySettings) -> Iterator[Cell]:
    """Yields the product of the axes, in which the last one changes fastest."""
    axes = _axes(settings) | {"injection": [each == "yes" for each in settings.injection]}
    return (Cell(*values) for values in product(*axes.values()))


def _axes(settings: ArchitectureStudySettings) -> dict[str, Sequence[Any]]:
    """Returns the values of every field of a cell, from the setting of its name or its plural."""
    names = [name for field in fields(Cell) for name in (field.name, f"{field.name}s")]
    return {name: getattr(settings, name) for name in names if hasattr(settings, name)}


def architecture_plans(settings: ArchitectureStudySettings) -> list[Plan]:
    """Makes the plan of every cell; raises what `run_architecture_study` raises."""
    _check_axes(settings)
    with ExitStack() as stack:
        path = settings.data
        if path is None:
            path = stack.enter_context(as_file(files("looptap.capture.studies") / "demo_prompts.jsonl"))
        data = DataSettings(data=path, field=settings.field, limit=settings.limit)
        dataset = read_dataset(path, BYTES, field=data.field, limit=data.limit)
        cells = cells_of(settings)
        return [make_plan(_capture(settings, cell, data, dataset), dataset=dataset) for cell in cells]


def _capture(
    settings: ArchitectureStudySettings, cell: Cell, data: DataSettings, dataset: Dataset
) -> CaptureSettings:
    """Returns what a user would give `looptap capture` for one cell."""
    return CaptureSettings(
        model=ModelSettings(model=cell.spec(settings.head_width), device=settings.device),
        data=data,
        measure=MeasureSettings(
            quantities=QUANTITIES,
            states=(STATES,),
            tokens="last",
            seed=cell.seed,
            # slots for all tokens where they are few, so that hundreds of stores are read without padding
            unit_tokens=max(dataset.longest, min(dataset.num_tokens, DEFAULT_UNIT_TOKENS)),
            batch_tokens=settings.batch_tokens,
        ),
        run=RunSettings(store=settings.out / f"{cell.name}.zarr"),
    )


def _check_axes(settings: ArchitectureStudySettings) -> None:
    for name, values in _axes(settings).items():
        option = f"--{name.replace('_', '-')}"
        if not values:
            raise PlanError(f"{option} has no value; give at least one, or leave it out for the paper's")
        if twice := list(dict.fromkeys(value for value in values if values.count(value) > 1)):
            raise PlanError(f"{option} has {', '.join(map(str, twice))} twice; give each once")
    if min(settings.layers) < 1:
        raise PlanError(f"a core has at least 1 layer, and --layers has {min(settings.layers)}")
    if min(settings.recurrences) < 2:
        raise PlanError(
            f"a step is from one recurrence to the next, which takes 2, and --recurrences has "
            f"{min(settings.recurrences)}"
        )
    if settings.head_width < 2 or settings.head_width % 2:
        raise PlanError(f"--head-width must be an even number from 2, got {settings.head_width}")
    for width in settings.widths:
        if width > settings.head_width and width % settings.head_width:
            raise PlanError(
                f"--widths has {width}, which heads of {settings.head_width} channels do not divide; give a "
                "multiple of that, a smaller width, or another --head-width"
            )
    if settings.limit < 1:
        raise PlanError(f"--limit must be at least 1, got {settings.limit}")


def _check_stores(plans: Sequence[Plan], out: Path) -> None:
    """Refuses, before anything runs, what `prepare_store` would refuse at one capture after another."""
    needed = 0
    for plan in plans:
        if not store_exists(plan.store):
            needed += disk_bytes(plan)
        elif differences := plan_differences(Store.open(plan.store).document, plan.stored().to_json()):
            raise OtherPlanError(
                f"{plan.store} was begun with another plan; it differs in\n  "
                + "\n  ".join(differences)
                + "\ngo on with the old settings, or choose another --out"
            )
    free = open_place(out).free_bytes()
    if free is not None and needed > free:
        raise NoRoomError(
            f"the stores in {out} need up to {needed / 2**20:,.1f} MiB more and its disk has "
            f"{free / 2**20:,.1f} MiB free; choose fewer values or rows, or another disk"
        )
