"""Makes an unfinished store of a damaged one: removes what is wrong, which capturing again puts back.

Every step leaves a store that is sound for readers of the ledger, so a repair may be killed anywhere and run
again: first nothing says any more that the store is finished, then the units' ledger entries go, and only
then their files.
"""

import datetime
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ....errors import StoreDamagedError
from ..keys import ATTEMPTS, COMPLETE, FILES, LEDGER, STAGING, SUMMARY, attempt_key, attempt_of, entry_key
from ..places.lock import driver_lock
from ..places.open import open_place
from ..writing.commit import Store
from .examined import Problem
from .planned_files import read_planned
from .retry import Patience
from .strangers import passing_files
from .verify import check_units, examine


@dataclass(frozen=True)
class Repair:
    """The result of `repair_store`."""

    path: str
    problems: list[Problem]
    """All that was wrong."""
    unread: list[Problem]
    """Files that could not be read: nothing was done about them."""
    units_voided: list[int]
    """Units that were committed and are to do again."""
    files_removed: int
    """Files that were removed: those of voided units, and what killed processes left."""
    files_restored: list[str]
    """Files that were written again from what the rest of the store tells."""
    units_missing: list[int]
    """Units to do now."""
    irreparable: list[Problem]
    """Problems of files that only the data tell, which the capture's own command writes again, and of things
    that are no files, which are to be moved away."""
    foreign: list[str]
    """Names in the store that are none of its files; they were left alone."""


def repair_store(path: str | Path) -> Repair:
    """Voids every unit that was read and is not as it was committed, writes again what the plan tells, and
    removes what killed attempts left. What could not be read stays as it is.

    Raises:
        StoreLockedError: a driver is at work on the store.
        StoreError, StoreMissingError: there is no store of this format, or too little is left of one.
    """
    read_planned(open_place(path), Patience())  # says what is wrong with the path itself
    with driver_lock(path):
        found = examine(path)
        store, planned = found.store, found.planned
        folders = [LEDGER, ATTEMPTS, STAGING, *store.metadata]
        store.place.restore_folders(folders)
        blocked = {problem.file for problem in found.blocked}
        irreparable = [Problem(None, key, what) for key, what in planned.wrong.items()]
        irreparable = [problem for problem in irreparable if problem.file not in planned.content]
        irreparable += found.blocked
        restored = [key for key in planned.content if key not in blocked]
        for key in sorted(restored, key=lambda key: (key == FILES, key == "zarr.json")):  # these last
            store.place.replace(key, planned.content[key])
        voided = sorted({problem.unit for problem in found.problems if problem.unit is not None})
        closing = {COMPLETE, SUMMARY, *store.layout.chunk_keys("unit_done")}
        is_closing = any(problem.file in closing for problem in found.problems)
        if voided or is_closing:
            _reopen(store)
        _note(store, found.problems)
        store.place.remove(map(entry_key, voided))
        num_removed = len(voided) + _remove_leftovers(store, found.leftovers, voided)
        clean(store)
        if is_closing and not store.todo():
            store.finish()
        return Repair(
            path=str(store),
            problems=[*found.problems, *found.blocked],
            unread=found.unread,
            units_voided=voided,
            files_removed=num_removed,
            files_restored=sorted(restored),
            units_missing=store.todo(),
            irreparable=irreparable,
            foreign=found.foreign,
        )


def clean(store: Store) -> None:
    """Removes what killed attempts left, and voids entries that they left in doubt.

    For the driver alone, while no worker runs.
    """
    store.place.restore_folders([LEDGER, ATTEMPTS, STAGING])
    store.clean_drafts()
    store.place.remove(passing_files(store))
    _void_doubtful(store)


def _void_doubtful(store: Store) -> None:
    """Voids entries that a later attempt may have made untrue, if both were killed before either noticed.

    Reads nothing of units whose entry is of their last attempt, which are all but a few.
    """
    last = _last_attempts(store)
    done = set(store.done())
    doubtful = []
    for unit, number in last.items():
        if number > 1 and unit in done and not _is_of(store, unit, number):
            doubtful.append(unit)
    if doubtful and (problems := check_units(store, doubtful)):
        _reopen(store)
        _note(store, problems)
        store.place.remove({entry_key(problem.unit) for problem in problems if problem.unit is not None})


def _is_of(store: Store, unit: int, number: int) -> bool:
    try:
        entry = store.entry(unit)
        return entry is not None and entry["attempt"] == number
    except StoreDamagedError:
        return False


def _last_attempts(store: Store) -> dict[int, int]:
    """The highest number of each unit's attempts."""
    last: dict[int, int] = {}
    for attempt in map(attempt_of, store.place.file_names(ATTEMPTS)):
        if attempt is not None and attempt[0] < store.num_units:
            unit, number = attempt
            last[unit] = max(last.get(unit, 0), number)
    return last


def _reopen(store: Store) -> None:
    """Makes a finished store, all of whose units are committed, an unfinished one."""
    store.place.remove([COMPLETE])
    store.place.remove([SUMMARY])
    for key, content in store.marks(done=False).items():
        store.place.replace(key, content)


def _remove_leftovers(store: Store, leftovers: list[str], voided: list[int]) -> int:
    """Removes files of voided units, and those that attempts left which this store knows of."""
    begun = _last_attempts(store)
    files = [key for name in store.arrays for key in _shards_of(store, name, voided)]
    there = {f"{name}/{file}" for name in store.arrays for file in store.place.file_names(name)}
    left = [key for key in leftovers if (unit := store.unit_of(key)) is None or unit in begun]
    gone = sorted({*(there & set(files)), *left})
    store.place.remove(gone)
    return len(gone)


def _shards_of(store: Store, name: str, units: list[int]) -> Iterator[str]:
    for unit in units:
        yield from store.shard_keys(name, unit)


def _note(store: Store, problems: list[Problem]) -> None:
    """Writes the reason to the file of the attempt that had committed the unit, for `status`."""
    reasons = {problem.unit: str(problem) for problem in problems if problem.unit is not None}
    if not reasons:
        return
    last = _last_attempts(store)
    for unit, reason in reasons.items():
        note = {"unit": unit, "attempt": last.get(unit, 1), "error": f"voided by repair: {reason}"}
        note |= {"host": platform.node(), "time": datetime.datetime.now(datetime.UTC).isoformat()}
        store.place.replace(attempt_key(unit, last.get(unit, 1)), json.dumps(note).encode())
