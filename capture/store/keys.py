"""Names inside a store that are not arrays, in one place for all who write, read or look for them.

A key is a path inside the store with slashes, the same on a disk and in an object store. A name that was
found in a store means something only if it reads exactly as it is written here: "07.json" is no ledger entry.
"""

import re

LEDGER, ATTEMPTS, STAGING = ".looptap/ledger", ".looptap/attempts", ".looptap/staging"
PLAN, FILES = ".looptap/plan.json", ".looptap/files.json"
COMPLETE, SUMMARY = ".looptap/complete", ".looptap/summary.parquet"
DRIVER_LOCK, GUARD = ".looptap/driver.lock", ".looptap/driver.guard"
MAKING = ".looptap/making.json"
"""The file that says whose objects they are, while a store is being made in an object store."""

ARRAY_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

_ENTRY = re.compile(r"(0|[1-9][0-9]{0,17})\.json")
_ATTEMPT = re.compile(r"(0|[1-9][0-9]{0,17})\.([1-9][0-9]{0,17})")
# what is there for moments while a file is replaced or the lock looked at, and stays where that was killed
_PASSING = re.compile(
    r"\.(?P<of>.+)\.[0-9]+\.new|(driver\.lock|clock)\.[0-9a-f]{16}|probe\..+\.[0-9]+\.[0-9a-f]{16}"
)


def entry_key(unit: int) -> str:
    """Returns the key of a unit's ledger entry, which commits it."""
    return f"{LEDGER}/{unit}.json"


def attempt_key(unit: int, number: int) -> str:
    """Returns the key of the file that says an attempt has begun and, if it failed, why."""
    return f"{ATTEMPTS}/{unit}.{number}"


def entry_unit(name: str) -> int | None:
    """Returns the unit whose ledger entry has this name; None if it is no entry's."""
    match = _ENTRY.fullmatch(name)
    return int(match[1]) if match else None


def attempt_of(name: str) -> tuple[int, int] | None:
    """Returns unit and number of the attempt whose file, or folder, has this name; None if it is none's."""
    match = _ATTEMPT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def passing_for(name: str) -> str | None:
    """Returns the name of the file for which one of this name is there for a moment; None if it is no such
    name.

    ".plan.json.17.new" is there for "plan.json", "clock.…" and "driver.lock.…" for "driver.lock".
    """
    match = _PASSING.fullmatch(name)
    return None if match is None else match["of"] or "driver.lock"
