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
from ..data import open_tokenizer, read_dataset
from ..plan import Plan, make_plan
from ..run import Outcome
from ..settings import ArchitectureStudySettings, CaptureSettings
from ..store.layout import plan_differences, store_exists
from ..store.places.open import open_place
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
    stores = tuple(Path(plan.settings.store) for plan in plans)
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
        data = settings.data
        if data is None:
            data = stack.enter_context(as_file(files("looptap.capture.studies") / "demo_prompts.jsonl"))
        unit_tokens = _unit_tokens(settings, data)
        return [make_plan(_capture(settings, cell, data, unit_tokens)) for cell in cells_of(settings)]


def _capture(
    settings: ArchitectureStudySettings, cell: Cell, data: Path, unit_tokens: int
) -> CaptureSettings:
    """What a user would give `looptap capture` for one cell."""
    return CaptureSettings(
        model=cell.spec(settings.head_width),
        data=data,
        store=settings.out / f"{cell.name}.zarr",
        field=settings.field,
        limit=settings.limit,
        quantities=QUANTITIES,
        states=(STATES,),
        tokens="last",
        device=settings.device,
        seed=cell.seed,
        unit_tokens=unit_tokens,
        batch_tokens=settings.batch_tokens,
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
        if not store_exists(plan.settings.store):
            needed += plan.disk_bytes
        elif differences := plan_differences(Store.open(plan.settings.store).plan, plan.document()):
            raise OtherPlanError(
                f"{plan.settings.store} was begun with another plan; it differs in\n  "
                + "\n  ".join(differences)
                + "\ngo on with the old settings, or choose another --out"
            )
    free = open_place(out).free_bytes()
    if free is not None and needed > free:
        raise NoRoomError(
            f"the stores in {out} need up to {needed / 2**20:,.1f} MiB more and its disk has "
            f"{free / 2**20:,.1f} MiB free; choose fewer values or rows, or another disk"
        )


def _unit_tokens(settings: ArchitectureStudySettings, data: Path) -> int:
    """Slots for all tokens where they are few, so that hundreds of stores are read without their padding."""
    dataset = read_dataset(data, open_tokenizer(None), field=settings.field, limit=settings.limit)
    longest = max(map(len, dataset.rows))
    return max(longest, min(dataset.num_tokens, DEFAULT_UNIT_TOKENS))


def _short(number: float) -> str:
    """The shortest text that reads back as the number."""
    return repr(float(number)).removesuffix(".0")
