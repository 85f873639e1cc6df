"""Builds a worker in the process where its engine wants it, and runs its units.

Results are not sent back: they are on disk.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ...errors import RecipeError, StoreRefusedError, StoreUnreachableError, UnitTakenError
from .events import Receipt

if TYPE_CHECKING:
    from ..models.load import ModelSource
    from ..models.starts import StatesFile
    from ..plan import Plan
    from ..store.plan import StoredModel
    from ..store.writing.commit import Store
    from ..worker import Worker


ENDS_RUN = (StoreRefusedError, StoreUnreachableError)  # no unit can be committed any more
RunUnit = Callable[[int], Receipt]
Recipe = Callable[[], RunUnit]  # builds what runs units, in the process where it will

_MAX_TAKEN = 5  # times that a worker begins one unit


@dataclass(frozen=True)
class CaptureRecipe:
    """Builds a capture's worker in another process, from names that mean the same everywhere and hashes that
    prove it; small, and sent there by pickle.
    """

    store: str
    """Path or URL of the store, which holds the plan."""
    plan_hash: str
    created: str | None
    """Time at which the store was made; tells stores of one plan at the same path of two machines apart."""
    model: str
    loop: str | None
    recurrences: int | None
    initial_states: "StatesFile | None"

    def __call__(self) -> RunUnit:
        """Builds the worker. Raises RecipeError, ModelError or StoreError if it is not the planned one."""
        from ..models.load import find_model
        from ..store.plan import StoredModel
        from ..store.writing.commit import Store

        store = Store.open(self.store, is_known=True)
        if (store.plan.hash, store.plan.created) != (self.plan_hash, self.created):
            raise RecipeError(
                f"{self.store} is another store here than where the capture was started: "
                "put it on a file system or object store that all machines share"
            )
        source = find_model(self.model, self.loop, self.recurrences)
        self._check_model(StoredModel.of(source.identity()), store.plan.model)
        self._check_initial_states()
        return make_runner(source, store, self.initial_states)

    def _check_model(self, here: "StoredModel", planned: "StoredModel") -> None:
        pairs = [(f.name, getattr(here, f.name), getattr(planned, f.name)) for f in fields(here)]
        # neurons are measured from the weights, which have a hash
        if differing := [pair for pair in pairs if pair[1] != pair[2] and pair[0] != "neurons"]:
            what = ", ".join(f"{name} {ours} (planned: {theirs})" for name, ours, theirs in differing)
            raise RecipeError(
                f"{self.model} is not the model that the capture was planned with; it differs in {what}: "
                "give every machine the same files"
            )

    def _check_initial_states(self) -> None:
        if self.initial_states is None:
            return
        path, planned = self.initial_states.path, self.initial_states.sha256
        if not path.is_file() or _sha256(path) != planned:
            raise RecipeError(
                f"--initial-state {path} is not there, or not the file that the capture was planned with: "
                "put it where all machines find it"
            )


def make_recipe(plan: "Plan", store: "Store") -> CaptureRecipe:
    """Returns the recipe for a plan's workers; paths of this machine in it are absolute."""
    model, states = plan.settings.model, plan.initial_states
    return CaptureRecipe(
        store=store.place.address,
        plan_hash=store.plan.hash,
        created=store.plan.created,
        model=os.path.abspath(model.model) if os.path.isdir(model.model) else model.model,
        loop=model.loop,
        recurrences=model.recurrences,
        initial_states=states and replace(states, path=states.path.absolute()),
    )


def make_runner(source: "ModelSource", store: "Store", initial_states: "StatesFile | None") -> RunUnit:
    """Loads a worker's model as the store's plan says; returns a function that runs a unit with it."""
    from ..worker import Worker

    settings = store.plan.settings
    worker = Worker(source.load(settings.device, settings.dtype), store, initial_states)
    return lambda unit: run_unit(worker, store, unit)


def run_unit(worker: "Worker", store: "Store", unit: int) -> Receipt:
    """Runs a unit and returns its receipt, or that of a worker which committed it meanwhile.

    If another worker began a later attempt, as this one was slow or thought lost, it gets more time to commit
    than this one had: a third attempt would stop it in turn. Only if it then has not, because it died, the
    unit is begun again. That is no fault of the unit's.
    """
    num_taken = 0
    while True:
        began_s = time.monotonic()
        try:
            return Receipt.of(worker.run(unit))
        except UnitTakenError:
            # two of them must not keep step
            seconds = (time.monotonic() - began_s) * (1 + random.random()) + random.random()
            if (receipt := _await_commit(store, unit, seconds)) is not None:
                return receipt
            num_taken += 1
            if num_taken == _MAX_TAKEN:
                raise


def _await_commit(store: "Store", unit: int, seconds: float) -> Receipt | None:
    """Waits until a unit is committed; None if it was not in so many seconds."""
    end_s, pause_s = time.monotonic() + seconds, 0.1
    while (receipt := committed(store, unit)) is None and (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, 2.0)
    return receipt


def committed(store: "Store", unit: int) -> Receipt | None:
    """Looks a unit up in the ledger; None while it is not committed."""
    return None if (entry := store.entry(unit)) is None else Receipt.of(entry)


def _sha256(path: Any) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
