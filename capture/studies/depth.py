"""The depth study: one checkpoint at many test-time recurrence counts (arXiv 2604.11791, section 5.2).

Up to a recurrence, the core does the same whatever count it is run to: a capture at the largest count holds
the core of all. The rest is not in it. What the coda gets, and so all of the coda, differs from count to
count, and so does what is measured against the last recurrence: gaps, `lens_kl`, and the exit gate's last
share. So every count is an ordinary capture of its own. With counts that double, all of them together take
twice the time and room of the largest.

Every capture keeps what the last block leaves, which is what the head is given of the whole model: the only
thing here that sees the coda of every count.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import PlanError
from ..models.load import ModelSource, find_model
from ..plan import Plan, make_plan
from ..run import Outcome
from ..settings import (
    CaptureSettings,
    DepthStudySettings,
    MeasureSettings,
    ModelSettings,
    RunSettings,
)

QUANTITIES = ("residual", "steps", "gaps", "attention", "lens", "exit")
_BEYOND = 4  # times the model's own count, by default


@dataclass(frozen=True)
class DepthStudy:
    """The stores of a depth study."""

    stores: tuple[Path, ...]
    """Paths of the stores by count, the smallest first."""
    own: int
    """The model's own count."""
    complete: bool


def run_depth_study(settings: DepthStudySettings, run: Callable[[Plan], Outcome]) -> DepthStudy:
    """Captures what is not there yet, the smallest count first.

    Args:
        run: an ordinary capture, such as `run_with_progress`.
    Raises:
        as `make_plan`: every count's plan is made before anything runs; PlanError: a count below 1, a count
        twice, or a model without a loop.
    """
    own, plans = depth_plans(settings)
    outcomes = [run(plan) for plan in plans]
    stores = tuple(Path(plan.store) for plan in plans)
    return DepthStudy(stores, own, all(outcome.complete for outcome in outcomes))


def depth_plans(settings: DepthStudySettings) -> tuple[int, list[Plan]]:
    """Returns the model's own count, and the plan of every count of the study."""
    source = find_model(settings.model.model, settings.model.loop)
    if not source.description.core:
        raise PlanError(
            f"{source.description.notation} has no loop to run more often; "
            "give a window of its layers with --loop first-lastxtimes"
        )
    own = source.description.recurrences
    return own, [_plan(settings, source, count) for count in counts_of(settings.counts, own)]


def counts_of(wanted: tuple[int, ...], own: int) -> list[int]:
    """Returns the counts of a study in order, with the model's own among them.

    Raises:
        PlanError: one is below 1 or there twice.
    """
    if wanted and min(wanted) < 1:
        raise PlanError(f"a model runs its core at least once, and counts has {min(wanted)}")
    if twice := sorted({count for count in wanted if wanted.count(count) > 1}):
        raise PlanError(f"counts has {', '.join(map(str, twice))} twice; give each once")
    doubled = [2**power for power in range((_BEYOND * own).bit_length())]
    return sorted({*(wanted or (each for each in doubled if each <= _BEYOND * own)), own})


def _plan(settings: DepthStudySettings, source: ModelSource, count: int) -> Plan:
    """Makes the plan of what a user would give `looptap capture` for one count."""
    d, model = source.description, settings.model
    last = "coda[-1]" if d.coda else "core[-1]@last"
    loop = None if model.loop is None else re.sub(r"x\d+$", f"x{count}", model.loop)
    wanted = CaptureSettings(
        model=ModelSettings(
            model=model.model,
            dtype=model.dtype,
            device=model.device,
            loop=loop,
            recurrences=count if loop is None else None,
        ),
        data=settings.data,
        measure=MeasureSettings(
            quantities=QUANTITIES,
            states=(last,),
            seed=settings.seed,
            batch_tokens=settings.batch_tokens,
        ),
        run=RunSettings(store=settings.out / f"recurrences-{count}.zarr"),
    )
    return make_plan(wanted, ModelSource(source.spec, source.origin, d.with_recurrences(count)))
