"""What is in a store, and whether it is what was written: every byte against the checksums of the ledger."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from .commit import Store
from .disk import checksum
from .lock import lock_holder


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be; `unit` is None for what the planner wrote."""

    unit: int | None
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.unit is None else f' (unit {self.unit})'}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What `verify_store` found."""

    path: Path
    units_done: list[int]
    units_missing: list[int]
    problems: list[Problem]
    uncommitted: list[str]
    """Files of units without a ledger entry: left by an attempt that was killed, replaced by the next one."""
    num_files: int
    num_bytes: int

    @property
    def ok(self) -> bool:
        """Whether all that is committed is sound; units may be missing."""
        return not self.problems


def verify_store(path: str | Path) -> Report:
    """Read every file of a store and compare size and crc32c with what was recorded when it was written.

    Raises:
        StoreError, StoreMissingError: there is no store of this format.
    """
    store = Store.open(path)
    done = store.done()
    expected = list(_planned_files(store))
    problems: list[Problem] = []
    for unit in done:
        try:
            expected += _unit_files(store, unit)
        except (ValueError, KeyError, TypeError) as error:
            problems.append(Problem(unit, f".looptap/ledger/{unit}.json", f"cannot be read ({error})"))
    with ThreadPoolExecutor(8) as pool:
        checked = pool.map(lambda item: _check_file(store.path, *item), expected)
        problems += [problem for problem in checked if problem is not None]
    if not problems:
        problems += _check_metadata(store, done)
    todo = [unit for unit in range(store.num_units) if unit not in set(done)]
    return Report(
        path=store.path,
        units_done=done,
        units_missing=todo,
        problems=problems,
        uncommitted=sorted(_uncommitted_files(store, set(todo))),
        num_files=len(expected),
        num_bytes=sum(recorded["bytes"] for _, _, recorded in expected),
    )


def store_status(path: str | Path) -> dict[str, Any]:
    """How far a capture is, from its ledger.

    Returns:
        units_done, units_total, num_tokens, num_sequences, num_bytes, num_non_finite, seconds (of all
        workers), last_commit (ISO time or None), attempts, failures (what failed attempts noted: unit,
        attempt, error, host, time), driver (host, pid, silent_s of who is at work, or None), complete.
    """
    store = Store.open(path)
    totals = dict.fromkeys(("num_tokens", "num_sequences", "num_bytes", "num_non_finite"), 0)
    units, seconds, last_commit = 0, 0.0, None
    for entry in store.entries():
        units += 1
        seconds += entry["seconds"]
        last_commit = max(last_commit or "", entry["committed"])
        totals["num_tokens"] += entry["num_tokens"]
        totals["num_sequences"] += entry["num_sequences"]
        totals["num_bytes"] += sum(shard["bytes"] for shard in entry["shards"].values())
        totals["num_non_finite"] += sum(entry["non_finite"].values())
    attempts = [item for item in os.scandir(store.attempts_dir) if not item.name.startswith(".")]
    failed = [json.loads(Path(item.path).read_bytes()) for item in attempts if item.stat().st_size]
    return {
        "units_done": units,
        "units_total": store.num_units,
        **totals,
        "seconds": seconds,
        "last_commit": last_commit,
        "attempts": len(attempts),
        "failures": sorted(failed, key=lambda note: (note["unit"], note["attempt"])),
        "driver": lock_holder(path),
        "complete": (store.path / ".looptap" / "complete").exists(),
    }


_Expected = tuple[int | None, str, dict[str, Any]]  # unit, file, what was recorded of it


def _planned_files(store: Store) -> Iterator[_Expected]:
    files = json.loads((store.path / ".looptap" / "files.json").read_bytes())
    return ((None, file, recorded) for file, recorded in files.items())


def _unit_files(store: Store, unit: int) -> list[_Expected]:
    entry = json.loads((store.ledger_dir / f"{unit}.json").read_bytes())
    if entry["unit"] != unit or set(entry["shards"]) != set(store.arrays):
        raise ValueError(f"it is for unit {entry['unit']} and arrays {', '.join(entry['shards'])}")
    return [(unit, shard["file"], shard) for shard in entry["shards"].values()]


def _check_file(root: Path, unit: int | None, file: str, recorded: dict[str, Any]) -> Problem | None:
    try:
        size = (root / file).stat().st_size
        if size != recorded["bytes"]:
            return Problem(unit, file, f"holds {size} bytes, {recorded['bytes']} were written")
        found = checksum(root / file)
    except FileNotFoundError:
        return Problem(unit, file, "is missing")
    except OSError as error:
        return Problem(unit, file, f"cannot be read ({error.strerror})")
    if found != recorded["crc32c"]:
        return Problem(unit, file, f"crc32c is {found}, {recorded['crc32c']} was written")
    return None


def _check_metadata(store: Store, done: list[int]) -> Iterator[Problem]:
    """Whether zarr-python opens every array, and `unit_done` of a closed store says what the ledger says."""
    group = zarr.open_group(str(store.path), mode="r")
    for name in [*str(group.attrs["coordinates"]).split(), *store.arrays]:
        try:
            assert isinstance(group[name], zarr.Array)
        except (KeyError, ValueError, TypeError) as error:
            yield Problem(None, f"{name}/zarr.json", f"zarr {zarr.__version__} cannot open it ({error})")
            return
    if (store.path / ".looptap" / "complete").exists():
        marked = np.flatnonzero(np.asarray(zarr.open_array(str(store.path), path="unit_done", mode="r")[...]))
        if not np.array_equal(marked, done):
            yield Problem(None, "unit_done", f"marks {len(marked)} units, the ledger has {len(done)}")


def _uncommitted_files(store: Store, todo: set[int]) -> Iterator[str]:
    for name in store.arrays:
        for item in os.scandir(store.path / name):
            key = item.name.split(".")
            if key[0] == "c" and int(key[1]) in todo:
                yield f"{name}/{item.name}"
