"""Names inside a store that are not arrays, in one place for all who write, read or look for them.

A key is a path inside the store with slashes, the same on a disk and in an object store.
"""

LEDGER, ATTEMPTS, STAGING = ".looptap/ledger", ".looptap/attempts", ".looptap/staging"
PLAN, FILES = ".looptap/plan.json", ".looptap/files.json"
COMPLETE, SUMMARY = ".looptap/complete", ".looptap/summary.parquet"
DRIVER_LOCK = ".looptap/driver.lock"


def entry_key(unit: int) -> str:
    """Returns the key of a unit's ledger entry, which commits it."""
    return f"{LEDGER}/{unit}.json"


def attempt_key(unit: int, number: int) -> str:
    """Returns the key of the file that says an attempt has begun and, if it failed, why."""
    return f"{ATTEMPTS}/{unit}.{number}"
