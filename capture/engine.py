"""The local engine: works through units in this process, one after the other."""

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .initial_states import StatesFile
from .models.load import ModelSource
from .store.commit import Store
from .store.errors import StoreFullError, UnitTakenError
from .worker import Worker

MAX_TRIES = 3


@dataclass(frozen=True)
class UnitDone:
    """A unit was committed."""

    unit: int
    entry: dict[str, Any]
    """Its ledger entry."""


@dataclass(frozen=True)
class UnitFailed:
    """A unit could not be captured, and will not be tried again by this run."""

    unit: int
    error: str
    """The last traceback."""


def run_local(
    source: ModelSource, store: Store, units: Iterable[int], initial_states: StatesFile | None = None
) -> Iterator[UnitDone | UnitFailed]:
    """Loads the model once and captures every unit; a unit that raises three times is reported and the rest
    goes on.

    Raises:
        StoreFullError: no unit can be committed any more; what is committed stays.
    """
    worker = Worker(source, store, initial_states)
    for unit in units:
        error = ""
        for _ in range(MAX_TRIES):
            try:
                yield UnitDone(unit, worker.run(unit))
                break
            except StoreFullError:
                raise
            except UnitTakenError:  # by another driver that took the lock over; its result is as good
                if (entry := store.entry(unit)) is not None:
                    yield UnitDone(unit, entry)
                    break
                error = traceback.format_exc()
            except Exception:
                # whatever a model or a driver throws belongs to this unit alone
                error = traceback.format_exc()
        else:
            yield UnitFailed(unit, error)
