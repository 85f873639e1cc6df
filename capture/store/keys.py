"""Names inside a store that are not arrays: one place for what several rooms write, read and look for.

A key is a path inside the store with slashes, the same on a disk and in an object store.
"""

LEDGER, ATTEMPTS, STAGING = ".looptap/ledger", ".looptap/attempts", ".looptap/staging"
PLAN, FILES = ".looptap/plan.json", ".looptap/files.json"
COMPLETE, SUMMARY = ".looptap/complete", ".looptap/summary.parquet"
DRIVER_LOCK = ".looptap/driver.lock"


def entry_key(unit: int) -> str:
    """The key of a unit's ledger entry, which commits it."""
    return f"{LEDGER}/{unit}.json"


def attempt_key(unit: int, number: int) -> str:
    """The key of the file that says an attempt has begun and, if it failed, why."""
    return f"{ATTEMPTS}/{unit}.{number}"
