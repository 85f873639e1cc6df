"""A whole capture: plan, store, engine, progress, end. Running it again goes on where it stopped."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .engine import UnitDone, UnitFailed, run_local
from .plan import Plan, PlanError
from .store.commit import Store
from .store.layout import create_store, plan_differences, store_exists
from .store.lock import driver_lock


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    path: Path
    num_units: int
    num_resumed: int
    """Units that were there before this run."""
    failures: tuple[UnitFailed, ...]
    num_non_finite: int
    """Values of this run's units that are infinite or undefined where a number is due."""

    @property
    def complete(self) -> bool:
        return not self.failures


def prepare_store(plan: Plan) -> Store:
    """Makes the plan's store, or opens it if it was begun before.

    Raises:
        PlanError: the store at the path belongs to another plan, or the disk has too little room.
        StoreExistsError: the path holds something else.
    """
    path = plan.settings.store
    document = plan.document()
    if store_exists(path):
        store = Store.open(path)
        if differences := plan_differences(store.plan, document):
            raise PlanError(
                f"{path} was begun with another plan; it differs in\n  "
                + "\n  ".join(differences)
                + "\ngo on with the old settings, or choose another --store"
            )
        _check_disk(plan, len(store.todo()))
        return store
    _check_disk(plan, plan.slots.num_units)
    create_store(path, plan=document, coordinates=plan.coordinates(), arrays=plan.arrays())
    return Store.open(path)


def run_capture(plan: Plan, on_event: Callable[[UnitDone | UnitFailed], None] = lambda _: None) -> Outcome:
    """Captures what is not yet in the store.

    Args:
        on_event: told of every unit that ends.
    Raises:
        as `prepare_store`; StoreLockedError: another run writes this store; StoreFullError: the disk filled
        up.
    """
    store = prepare_store(plan)
    failures: list[UnitFailed] = []
    num_non_finite = 0
    with driver_lock(store.path):
        todo = store.todo()
        store.clean_staging()
        if todo:
            for event in run_local(plan.source, store, todo, plan.initial_states):
                if isinstance(event, UnitFailed):
                    failures.append(event)
                else:
                    num_non_finite += sum(event.entry["non_finite"].values())
                on_event(event)
        if not failures:
            store.finish()
    return Outcome(
        path=store.path,
        num_units=plan.slots.num_units,
        num_resumed=plan.slots.num_units - len(todo),
        failures=tuple(failures),
        num_non_finite=num_non_finite,
    )


def _check_disk(plan: Plan, num_todo: int) -> None:
    """Refuses before work begins; the estimate is of uncompressed arrays and so on the safe side."""
    needed = plan.disk_bytes // plan.slots.num_units * num_todo
    parent = next(
        p for p in [plan.settings.store.absolute(), *plan.settings.store.absolute().parents] if p.exists()
    )
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PlanError(
            f"{plan.settings.store} needs up to {needed / 2**20:,.1f} MiB and its disk has "
            f"{free / 2**20:,.1f} MiB free; choose fewer quantities, states or rows, or another disk"
        )
