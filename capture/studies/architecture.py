"""The architecture study: randomly initialised loops of every combination of norms, injection and layers,
and of the scales at which they stop converging (arXiv 2604.11791, section 4.2).

Every combination and seed is an ordinary capture into a store of its own, whose name says which one it is, so
that studies in one directory share what they have in common.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path

from ...errors import NoRoomError, OtherPlanError, PlanError
from ..data import Dataset, open_tokenizer, read_dataset
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
from ..store.layout import store_exists
from ..store.places.open import open_place
from ..store.plan import plan_differences
from ..store.writing.commit import Store
from ..units import DEFAULT_UNIT_TOKENS

QUANTITIES = ("residual", "steps", "gaps")
STATES = "core[all]@last"  # whether layers have points of their own
AXES = ("norms", "injection", "layers", "recurrences", "widths", "gains", "embedding_stds", "seeds")


@dataclass(frozen=True)
class Cell:
    """One combination with its seed."""

    norm: str
    injection: bool
    layers: int
    recurrences: int
    width: int
    gain: float
    embedding_std: float
    seed: int

    @property
    def name(self) -> str:
        """Of its store."""
        injection = "injection" if self.injection else "no-injection"
        return (
            f"{self.norm}-{injection}-{self.layers}x{self.recurrences}"
            f"-width{self.width}-gain{_short(self.gain)}-embedding{_short(self.embedding_std)}-seed{self.seed}"
        )

    def spec(self, head_width: int) -> str:
        """The model, as `looptap capture` takes it."""
        return (
            f"random:(0,{self.layers}x{self.recurrences},0){'I' if self.injection else ''},norm={self.norm},"
            f"width={self.width},heads={max(1, self.width // head_width)},gain={_short(self.gain)},"
            f"embedding_std={_short(self.embedding_std)},seed={self.seed}"
        )


@dataclass(frozen=True)
class ArchitectureStudy:
    """What was captured."""

    stores: tuple[Path, ...]
    """In the order of the axes' product."""
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
    """The product of the axes, the last one first to change."""
    s = settings
    is_injected = [each == "yes" for each in s.injection]
    axes = (s.norms, is_injected, s.layers, s.recurrences, s.widths, s.gains, s.embedding_stds, s.seeds)
    return (Cell(*values) for values in product(*axes))


def architecture_plans(settings: ArchitectureStudySettings) -> list[Plan]:
    """The plan of every cell; raises as `run_architecture_study`."""
    _check_axes(settings)
    with ExitStack() as stack:
        path = settings.data
        if path is None:
            path = stack.enter_context(as_file(files("looptap.capture.studies") / "demo_prompts.jsonl"))
        data = DataSettings(data=path, field=settings.field, limit=settings.limit)
        dataset = read_dataset(path, open_tokenizer(None), field=data.field, limit=data.limit)
        cells = cells_of(settings)
        return [make_plan(_capture(settings, cell, data, dataset), dataset=dataset) for cell in cells]


def _capture(
    settings: ArchitectureStudySettings, cell: Cell, data: DataSettings, dataset: Dataset
) -> CaptureSettings:
    """What a user would give `looptap capture` for one cell."""
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
    for name in AXES:
        values = getattr(settings, name)
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
    """Refuses before anything runs what `prepare_store` would refuse at one capture after another."""
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


def _short(number: float) -> str:
    """The shortest text that reads back as the number."""
    return repr(float(number)).removesuffix(".0")
