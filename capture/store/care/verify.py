"""Verifies a store: compares every piece of it with the checksums of the ledger."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from ....errors import StoreUnreachableError
from ..keys import COMPLETE, FILES, LEDGER, SUMMARY, entry_key
from ..places.place import Place
from ..writing.attempt import entry_checksum
from ..writing.commit import Store
from ..writing.encode import file_shape

_READ_BYTES = 8 << 20
_NUM_READERS = 8


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be; `unit` is None for a file that no unit wrote."""

    unit: int | None
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.unit is None else f' (unit {self.unit})'}: {self.what}"


@dataclass(frozen=True)
class Report:
    """The result of `verify_store`."""

    path: str
    units_done: list[int]
    units_missing: list[int]
    problems: list[Problem]
    uncommitted: list[str]
    """Files of units without a ledger entry: left by an attempt that was killed, replaced by the next one."""
    num_files: int
    num_bytes: int

    @property
    def ok(self) -> bool:
        """Whether everything that is committed is sound; units may be missing."""
        return not self.problems


@dataclass(frozen=True)
class _Written:
    """The record of a file, made when it was written."""

    unit: int | None
    key: str
    num_bytes: int
    pieces: list[list[Any]]
    """[offset, length, crc32c in hex] of all but holes, in file order."""


def verify_store(path: str | Path) -> Report:
    """Reads every file of a store and compares size and crc32c with what was recorded when it was written.

    What lies between the pieces that were recorded is a hole that no reader looks at, and not looked at here.

    Raises:
        StoreError, StoreMissingError: there is no store of this format.
    """
    store = Store.open(path)
    done = store.done()
    problems: list[Problem] = list(_foreign_entries(store, done))
    written: list[_Written] = []
    try:
        written += _planned_files(store)
    except StoreUnreachableError:  # no damage
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        problems.append(Problem(None, FILES, f"cannot be read ({error})"))
    unit_files, unreadable = _read_entries(store, done)
    written += unit_files
    problems += unreadable
    sizes = _sizes(store, written)
    problems += _check_files(store.place, sizes, written)
    if not problems:
        problems += _check_metadata(store, done)
    todo = [unit for unit in range(store.num_units) if unit not in set(done)]
    return Report(
        path=str(store),
        units_done=done,
        units_missing=todo,
        problems=problems,
        uncommitted=uncommitted_files(store, set(todo), list(sizes)),
        num_files=len(written),
        num_bytes=sum(file.num_bytes for file in written),
    )


def check_units(store: Store, units: list[int]) -> list[Problem]:
    """Returns what is wrong with these committed units."""
    written, problems = _read_entries(store, units)
    return problems + _check_files(store.place, _sizes(store, written), written)


def uncommitted_files(store: Store, todo: set[int], keys: list[str]) -> list[str]:
    """Returns the files of a store that belong to units that are not committed."""
    found = []
    for key in keys:
        name, _, file = key.partition("/")
        kind, *index = file.split(".")
        if name in store.arrays and kind == "c" and index:
            shards = store.unit_rows(name) // file_shape(store.arrays[name])[0]
            if int(index[0]) // shards in todo:
                found.append(key)
    return sorted(found)


def _foreign_entries(store: Store, done: list[int]) -> Iterator[Problem]:
    known = {f"{unit}.json" for unit in done}
    for name in sorted(set(store.place.names(LEDGER)) - known):
        if name[0] != ".":  # a network file system keeps names of deleted open files so
            yield Problem(None, f"{LEDGER}/{name}", "is no ledger entry of this plan")


def _planned_files(store: Store) -> list[_Written]:
    files = json.loads(store.place.read(FILES))
    return [
        _Written(None, key, file["bytes"], [[0, file["bytes"], file["crc32c"]]])
        for key, file in files.items()
    ]


def _unit_files(store: Store, unit: int) -> list[_Written]:
    entry = json.loads(store.place.read(entry_key(unit)))
    if entry["checksum"] != entry_checksum(entry):
        raise ValueError("it is not what was written")
    if entry["unit"] != unit or set(entry["shards"]) != set(store.arrays):
        raise ValueError(f"it is for unit {entry['unit']} and arrays {', '.join(entry['shards'])}")
    if entry["plan"] != store.plan.hash:
        raise ValueError("it is of another plan")
    files = []
    for name, shards in entry["shards"].items():
        for key, shard in zip(store.shard_keys(name, unit), shards, strict=True):
            files.append(_Written(unit, key, shard["bytes"], shard["pieces"]))
    return files


def _read_entries(store: Store, units: list[int]) -> tuple[list[_Written], list[Problem]]:
    written: list[_Written] = []
    problems: list[Problem] = []
    for unit in units:
        try:
            written += _unit_files(store, unit)
        except StoreUnreachableError:  # no damage
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            problems.append(Problem(unit, entry_key(unit), f"cannot be read ({error})"))
    return written, problems


def _sizes(store: Store, written: list[_Written]) -> dict[str, int]:
    """Returns the bytes of all files, by key, in the folders of these and of the arrays."""
    folders = {file.key.rpartition("/")[0] for file in written} | set(store.arrays)
    return {
        f"{folder}/{name}".lstrip("/"): size
        for folder in folders
        for name, size in store.place.sizes(folder).items()
    }


def _check_files(place: Place, sizes: dict[str, int], written: list[_Written]) -> list[Problem]:
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        checked = pool.map(lambda file: _check_file(place, sizes.get(file.key), file), written)
        return [problem for problem in checked if problem is not None]


def _check_file(place: Place, num_bytes: int | None, file: _Written) -> Problem | None:
    if num_bytes is None:
        return Problem(file.unit, file.key, "is missing")
    if num_bytes != file.num_bytes:
        return Problem(file.unit, file.key, f"holds {num_bytes} bytes, {file.num_bytes} were written")
    start, block = 0, b""
    try:
        for offset, length, wanted in file.pieces:
            value, at, end = 0, offset, offset + length
            while at < end:
                if not start <= at < start + len(block):
                    start, block = at, place.read_range(file.key, at, min(_READ_BYTES, num_bytes - at))
                part = block[at - start : end - start]
                if not part:
                    return Problem(file.unit, file.key, f"ends at {at}, {num_bytes} bytes were written")
                value, at = google_crc32c.extend(value, part), at + len(part)
            if (found := f"{value:08x}") != wanted:
                where = "" if length == num_bytes else f" of {length} bytes at {offset}"
                return Problem(file.unit, file.key, f"crc32c{where} is {found}, {wanted} was written")
    except StoreUnreachableError:  # no damage
        raise
    except OSError as error:
        return Problem(file.unit, file.key, f"cannot be read ({error.strerror or error})")
    return None


def _check_metadata(store: Store, done: list[int]) -> Iterator[Problem]:
    """Checks that zarr-python opens every array, and that a closed store's summary agrees with its ledger."""
    group = store.group()
    for name in [*str(group.attrs["coordinates"]).split(), *store.arrays]:
        try:
            assert isinstance(group[name], zarr.Array)
        except (KeyError, ValueError, TypeError) as error:
            yield Problem(None, f"{name}/zarr.json", f"zarr {zarr.__version__} cannot open it ({error})")
            return
    if not store.place.exists(COMPLETE):
        return
    marks = group["unit_done"]
    assert isinstance(marks, zarr.Array)
    marked = np.flatnonzero(np.asarray(marks[...]))
    if not np.array_equal(marked, done):
        yield Problem(None, "unit_done", f"marks {len(marked)} units, the ledger has {len(done)}")
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(store.place.read(SUMMARY)), columns=["unit", "attempt"])
        summary = table.to_pylist()
    except StoreUnreachableError:  # no damage
        raise
    except (OSError, pa.ArrowException) as error:
        yield Problem(None, SUMMARY, f"cannot be read ({error})")
        return
    if [row["unit"] for row in summary] != done:
        yield Problem(None, SUMMARY, f"has {len(summary)} units, the ledger has {len(done)}")
