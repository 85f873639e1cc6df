"""Makes an unfinished store of a damaged one: removes what is wrong, which capturing again puts back.

Every step leaves a store that is sound for readers of the ledger, so a repair may be killed anywhere and run
again: first nothing says any more that the store is finished, then the units' ledger entries go, and only
then their files.
"""

import datetime
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from ....errors import StoreError
from ..keys import ATTEMPTS, COMPLETE, FILES, LEDGER, PLAN, SUMMARY, attempt_key, entry_key
from ..places.lock import driver_lock
from ..writing.commit import Store
from .verify import Problem, check_units, uncommitted_files, verify_store


@dataclass(frozen=True)
class Repair:
    """The result of `repair_store`."""

    path: str
    problems: list[Problem]
    """All that was wrong."""
    units_voided: list[int]
    """Units that were committed and are to do again."""
    files_removed: int
    """Files that were removed: those of voided units and of killed attempts, and strays in the ledger."""
    files_restored: list[str]
    units_missing: list[int]
    """Units to do now."""
    irreparable: list[Problem]
    """Problems of files that were written when the store was made, from what is not in it."""


def repair_store(path: str | Path) -> Repair:
    """Voids every unit that is not as it was committed, and removes what killed attempts left.

    Raises:
        StoreLockedError: a driver is at work on the store.
        StoreError, StoreMissingError: there is no store of this format.
    """
    Store.open(path)  # says what is wrong with the path itself
    with driver_lock(path):
        report, store = verify_store(path), Store.open(path)
        voided = sorted({problem.unit for problem in report.problems if problem.unit is not None})
        foreign = [p.file for p in report.problems if p.unit is None and p.file.startswith(f"{LEDGER}/")]
        closing = [p for p in report.problems if p.file in ("unit_done", SUMMARY)]
        restored, irreparable = [], []
        for problem in report.problems:
            if problem.unit is not None or problem.file in foreign or problem in closing:
                continue
            if _restore(store, problem.file):
                restored.append(problem.file)
            else:
                irreparable.append(problem)
        if voided or closing:
            _reopen(store)
        _note(store, report.problems)
        store.place.remove([*map(entry_key, voided), *foreign])
        num_removed = len(voided) + len(foreign) + _remove_leftovers(store)
        clean(store)
        if closing and not store.todo():
            store.finish()
        return Repair(
            path=str(store),
            problems=report.problems,
            units_voided=voided,
            files_removed=num_removed,
            files_restored=restored,
            units_missing=store.todo(),
            irreparable=irreparable,
        )


def clean(store: Store) -> None:
    """Removes what killed attempts left, and voids entries that they left in doubt.

    For the driver alone, while no worker runs.
    """
    store.place.clean_drafts()
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
    except (StoreError, KeyError, TypeError):
        return False


def _last_attempts(store: Store) -> dict[int, int]:
    """The highest number of each unit's attempts."""
    last: dict[int, int] = {}
    for name in store.place.names(ATTEMPTS):
        unit, _, number = name.partition(".")
        if unit.isdecimal() and number.isdecimal():
            last[int(unit)] = max(last.get(int(unit), 0), int(number))
    return last


def _reopen(store: Store) -> None:
    """Makes a finished store, all of whose units are committed, an unfinished one."""
    store.place.remove([COMPLETE])
    store.place.remove([SUMMARY])
    marks = [f"unit_done/{name}" for name in store.place.names("unit_done") if name != "zarr.json"]
    store.place.remove(marks)


def _remove_leftovers(store: Store) -> int:
    keys = [f"{name}/{file}" for name in store.arrays for file in store.place.names(name)]
    left = uncommitted_files(store, set(store.todo()), keys)
    store.place.remove(left)
    return len(left)


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


def _restore(store: Store, key: str) -> bool:
    """Writes a file of the plan again from its copy in the group's zarr.json, if that is the same."""
    try:
        recorded = json.loads(store.place.read(FILES))[key]
    except (ValueError, KeyError, TypeError, OSError):
        return False
    if key == PLAN:
        data = json.dumps(store.document, indent=1).encode()
    elif key.partition("/")[2] == "zarr.json" and key.partition("/")[0] in store.metadata:
        data = json.dumps(store.metadata[key.partition("/")[0]], indent=2).encode()
    else:
        return False
    if (len(data), f"{google_crc32c.value(data):08x}") != (recorded["bytes"], recorded["crc32c"]):
        return False
    store.place.replace(key, data)
    return True
