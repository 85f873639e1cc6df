"""Runs a whole capture: plan, store, engine, events. Running it again goes on where it stopped."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import NoRoomError, OtherPlanError, os_errors_named
from .engines.drive import POLL_S
from .engines.engine import open_engine, run_units
from .engines.events import Event, FilesRestored, RunBegan, UnitDone, UnitFailed
from .plan import Plan
from .plan_cost import disk_bytes
from .probes.neurons import logit_moments, summarise
from .store.care.repair import clean
from .store.care.restore import restore_planned
from .store.group import store_exists
from .store.layout import create_store
from .store.places.lease import lost
from .store.places.lock import driver_lock
from .store.places.open import open_place
from .store.plan import plan_differences
from .store.writing.commit import Store


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    path: str | Path
    num_units: int
    num_resumed: int
    """Units that were committed before this run."""
    failures: tuple[UnitFailed, ...]
    num_left: int
    """Units that were not begun, because the run was told to stop."""
    num_non_finite: int
    """Values of this run's units that are infinite or undefined where a number is due."""

    @property
    def complete(self) -> bool:
        return not self.failures and not self.num_left


def begun_store(plan: Plan) -> Store | None:
    """Opens the plan's store; None where there is none yet.

    Raises:
        OtherPlanError: the store at the path belongs to another plan.
        StoreExistsError: the path holds something else.
    """
    if not store_exists(plan.store):
        return None
    store = Store.open(plan.store)
    if differences := plan_differences(store.document, plan.stored().to_json()):
        raise OtherPlanError(
            f"{plan.store} was begun with another plan; it differs in\n  "
            + "\n  ".join(differences)
            + "\ngo on with the old settings, or choose another --store"
        )
    return store


def prepare_store(plan: Plan) -> Store:
    """Makes the plan's store, or opens it if it was begun before.

    Raises:
        OtherPlanError, StoreExistsError: as `begun_store`; NoRoomError: the disk has too little room.
    """
    return _checked_store(plan, begun_store(plan))


def run_capture(
    plan: Plan,
    on_event: Callable[[Event], None] = lambda _: None,
    goes_on: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Captures what is not yet in the store.

    Args:
        on_event: told that the run began, of every unit that ends, and of workers that come and go.
        goes_on: asked all the time; after False, units in flight are finished and none is begun.
    Raises:
        as `prepare_store` and `open_engine`; StoreLockedError: another run writes this store; StoreFullError,
        StoreRefusedError: the disk filled up, or cannot be written any more; NoWorkersError: no worker is
        left.
    """
    failures: list[UnitFailed] = []
    num_non_finite = 0
    with ExitStack() as stack:
        begun = begun_store(plan)
        has_work = begun is None or bool(begun.todo())
        if has_work:
            stack.enter_context(open_engine(plan))
        store = _checked_store(plan, begun)
        lock = stack.enter_context(driver_lock(plan.store))
        with os_errors_named(store.place.address, "written"):
            restored = restore_planned(store, plan.coordinates()) if begun is not None else []
            clean(store)
        if restored:
            on_event(FilesRestored(restored))
        todo = store.todo()
        on_event(RunBegan(store.num_units, store.num_units - len(todo)))
        if todo and has_work:
            for event in run_units(plan, store, todo, _watching(lambda: lock.held, store, goes_on)):
                if isinstance(event, UnitFailed):
                    failures.append(event)
                elif isinstance(event, UnitDone):
                    num_non_finite += event.receipt.num_non_finite
                on_event(event)
        if not (left := store.todo()):
            lock.check()
            with os_errors_named(store.place.address, "written"):
                store.finish()
                clean(store)
    return Outcome(
        path=plan.store,
        num_units=store.num_units,
        num_resumed=store.num_units - len(todo),
        failures=tuple(failures),
        num_left=len(set(left) - {failure.unit for failure in failures}),
        num_non_finite=num_non_finite,
    )


def _checked_store(plan: Plan, begun: Store | None) -> Store:
    """Opens the store that was begun, or makes one; raises NoRoomError if its disk has too little room."""
    _check_disk(plan, plan.slots.num_units if begun is None else len(begun.todo()))
    if begun is not None:
        return begun
    stored = plan.stored()
    if plan.settings.measure.neurons:
        stored = replace(stored, model=replace(stored.model, neurons=neurons_of(plan)))
    create_store(plan.store, plan=stored, coordinates=plan.coordinates(), arrays=plan.arrays())
    return Store.open(plan.store)


def neurons_of(plan: Plan) -> dict[str, Any]:
    """Returns what a plan records of its model's neurons: `summarise` of the weights as they run."""
    run = plan.settings.run
    is_run_here = run.engine == "local" and run.workers is None
    return summarise(logit_moments(plan.source.load(plan.device if is_run_here else "cpu", plan.dtype)))


def _watching(is_held: Callable[[], bool], store: Store, goes_on: Callable[[], bool]) -> Callable[[], bool]:
    """Returns `goes_on`, made to raise if the run no longer holds the driver lock."""
    looked_s = time.monotonic()

    def ask() -> bool:
        nonlocal looked_s
        if time.monotonic() - looked_s >= POLL_S:
            looked_s = time.monotonic()
            with os_errors_named(store.place.address, "read"):
                held = is_held()
            if not held:
                raise lost(str(store))
        return goes_on()

    return ask


def _check_disk(plan: Plan, num_todo: int) -> None:
    """Raises NoRoomError if the disk has too little room, by the bytes of uncompressed arrays."""
    needed = disk_bytes(plan) // plan.slots.num_units * num_todo
    free = open_place(plan.store).free_bytes()
    if free is not None and needed > free:
        raise NoRoomError(
            f"{plan.store} needs up to {needed / 2**20:,.1f} MiB and its disk has "
            f"{free / 2**20:,.1f} MiB free; choose fewer quantities, states or rows, or another disk"
        )
