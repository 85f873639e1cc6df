"""How far a capture is, from its ledger and the notes of its attempts; no file of a quantity is looked at."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..keys import ATTEMPTS, COMPLETE, attempt_key, attempt_of
from ..ledger_entry import entry_bytes
from ..places.lock import lock_holder
from ..writing.commit import Store


@dataclass(frozen=True)
class FailedAttempt:
    """A failed attempt at a unit, as it was noted."""

    unit: int
    attempt: int
    error: str
    host: str
    time: str
    """Time at which it failed, ISO 8601."""
    done: bool
    """Whether the unit is committed by now."""


@dataclass(frozen=True)
class Driver:
    """The process that drives a capture into the store."""

    host: str
    pid: int
    silent_s: float
    """Seconds since its last sign of life."""


@dataclass(frozen=True)
class StoreStatus:
    """How far a capture is."""

    units_done: int
    units_total: int
    num_tokens: int
    num_sequences: int
    num_bytes: int
    num_non_finite: int
    """Captured values that are infinite or undefined where a number is due."""
    seconds: float
    """Work of all workers on the units that are done."""
    last_commit: str | None
    """Time of the last commit, ISO 8601; None before the first."""
    attempts: int
    """Attempts that were begun, at whatever unit."""
    failures: tuple[FailedAttempt, ...]
    """Failed attempts, ordered by unit and attempt."""
    driver: Driver | None
    """The process at work on the store; None without one."""
    complete: bool
    """Whether the store is closed, with every unit committed."""

    def to_json(self) -> dict[str, Any]:
        """Returns a dictionary for `json.dumps`, of the fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Returns the status that `to_json` made this dictionary of."""
        failures = tuple(FailedAttempt(**failure) for failure in document["failures"])
        driver = document["driver"] and Driver(**document["driver"])
        return cls(**document | {"failures": failures, "driver": driver})


def store_status(path: str | Path) -> StoreStatus:
    """Returns how far a capture is, from its ledger.

    Raises:
        StoreError, StoreMissingError: there is no store of this format.
    """
    store = Store.open(path)
    totals = dict.fromkeys(("num_tokens", "num_sequences", "num_bytes", "num_non_finite"), 0)
    done, seconds, last_commit = set[int](), 0.0, None
    for entry in store.entries():
        done.add(entry["unit"])
        seconds += entry["seconds"]
        last_commit = max(last_commit or "", entry["committed"])
        totals["num_tokens"] += entry["num_tokens"]
        totals["num_sequences"] += entry["num_sequences"]
        totals["num_bytes"] += entry_bytes(entry)
        totals["num_non_finite"] += sum(entry["non_finite"].values())
    attempts = {attempt_of(name): size for name, size in store.place.sizes(ATTEMPTS).items()}
    attempts = {at: size for at, size in attempts.items() if at is not None and at[0] < store.num_units}
    failures = [_failed(store, *at, done) for at, size in attempts.items() if size]
    holder = lock_holder(path)
    return StoreStatus(
        units_done=len(done),
        units_total=store.num_units,
        **totals,
        seconds=seconds,
        last_commit=last_commit,
        attempts=len(attempts),
        failures=tuple(sorted(failures, key=lambda failure: (failure.unit, failure.attempt))),
        driver=None if holder is None else Driver(holder["host"], holder["pid"], holder["silent_s"]),
        complete=store.place.exists(COMPLETE),
    )


def _failed(store: Store, unit: int, attempt: int, done: Collection[int]) -> FailedAttempt:
    try:
        note = json.loads(store.place.read(attempt_key(unit, attempt)))
        told = {name: str(note[name]) for name in ("error", "host", "time")}
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError):
        told = {"error": "its note is damaged", "host": "?", "time": "?"}
    return FailedAttempt(unit, attempt, **told, done=unit in done)
