"""Writing a store unit by unit: a unit is wholly there or not there, whatever is killed and whenever.

What an attempt at a unit writes stays in `staging/` until all of it is synced; then its files are linked to
their final names, and one exclusive ledger entry, `ledger/<u>.json`, is the commit. Units without an entry
are to do. Attempts are numbered: one that sees a later one stops, and one that went on regardless (a paused
process, a machine thought lost) finds its names taken, or its files not the ones in place, and withdraws
its entry.
"""

import datetime
import json
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import google_crc32c
import numpy as np
import zarr

from .disk import full_disk_named, identity, publish, replace, sync, write_new
from .encode import encode, unit_shape
from .errors import StoreError, UnitTakenError
from .layout import read_group, unit_arrays


class Store:
    """A store being written. Many processes may write units of it; one of them drives (`lock.py`)."""

    def __init__(self, path: Path, group: dict[str, Any]):
        self.path = path
        self.plan: dict[str, Any] = group["attributes"]["plan"]
        self.num_units: int = self.plan["num_units"]
        self.arrays = unit_arrays(group)
        self.ledger_dir = path / ".looptap" / "ledger"
        self.attempts_dir = path / ".looptap" / "attempts"
        self.staging_dir = path / ".looptap" / "staging"

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Raises StoreMissingError or StoreError where there is no store of this format."""
        return cls(Path(path), read_group(path))

    def done(self) -> list[int]:
        """Units that are committed, in order."""
        return sorted(int(entry.name[:-5]) for entry in os.scandir(self.ledger_dir) if entry.name[0] != ".")

    def todo(self) -> list[int]:
        """Units that are not committed, in order. Lists one directory and reads nothing else."""
        done = set(self.done())
        return [unit for unit in range(self.num_units) if unit not in done]

    def entry(self, unit: int) -> dict[str, Any] | None:
        """A unit's ledger entry; None while it is not committed."""
        try:
            return json.loads((self.ledger_dir / f"{unit}.json").read_bytes())
        except FileNotFoundError:
            return None

    def entries(self) -> Iterator[dict[str, Any]]:
        """The ledger entries of all committed units, in order."""
        for unit in self.done():
            yield cast(dict[str, Any], self.entry(unit))

    def begin(self, unit: int) -> "Attempt":
        """Start an attempt at a unit, numbered above all before it.

        Raises:
            UnitTakenError: the unit is committed already.
        """
        if not 0 <= unit < self.num_units:
            raise ValueError(f"unit {unit} is not in the plan: it has units 0 to {self.num_units - 1}")
        if (self.ledger_dir / f"{unit}.json").exists():
            raise UnitTakenError(f"unit {unit} of {self.path} is committed: nothing is left to do for it")
        number = 1
        with self.full_disk_named(unit):
            while True:
                try:
                    # numbers have no gaps, so the first free one is above all others
                    write_new(self.attempts_dir / f"{unit}.{number}", b"")
                    break
                except FileExistsError:
                    number += 1
            sync([self.attempts_dir])
            return Attempt(self, unit, number)

    def clean_staging(self) -> None:
        """Remove what killed attempts left. For the driver alone, while no worker runs."""
        for entry in os.scandir(self.staging_dir):
            shutil.rmtree(entry.path, ignore_errors=True)

    def finish(self) -> None:
        """Close a store whose units are all committed: check sizes, write `unit_done` and the summary.

        May be repeated, and killed anywhere.

        Raises:
            StoreError: units are missing, or a file has not the size its ledger entry says.
        """
        complete_path = self.path / ".looptap" / "complete"
        if complete_path.exists():
            return
        if todo := self.todo():
            raise StoreError(f"{self.path} lacks {len(todo)} of {self.num_units} units: capture again")
        for entry in self.entries():
            for name, shard in entry["shards"].items():
                shard_path = self.path / shard["file"]
                size = shard_path.stat().st_size if shard_path.exists() else None
                if size != shard["bytes"]:
                    raise StoreError(
                        f"{shard_path} should hold {shard['bytes']} bytes of {name}, unit {entry['unit']}, "
                        f"but {'is missing' if size is None else f'holds {size}'}: "
                        f"run `looptap verify {self.path}`"
                    )
        with full_disk_named(self.path, "the summary", 1024 * self.num_units):
            self._write_unit_done()
            replace(self.path / ".looptap" / "summary.parquet", _to_parquet(self.entries()))
            replace(complete_path, b"")
        self.clean_staging()

    def full_disk_named(self, unit: int) -> AbstractContextManager[None]:
        """Reports a full disk as StoreFullError, with what one unit takes before compression."""
        sizes = (math.prod(unit_shape(a)) * np.dtype(a["data_type"]).itemsize for a in self.arrays.values())
        return full_disk_named(self.path, f"unit {unit}", sum(sizes))

    def _write_unit_done(self) -> None:
        metadata = json.loads((self.path / "unit_done" / "zarr.json").read_bytes())
        (num_rows,) = unit_shape(metadata)
        for index, first in enumerate(range(0, self.num_units, num_rows)):
            done = np.ones(min(num_rows, self.num_units - first), np.uint8)
            replace(self.path / "unit_done" / f"c.{index}", encode(metadata, done).tobytes())


class Attempt:
    """One attempt at a unit: `write` every array of the store once, then `commit`.

    As a context manager it cleans up after itself if the body raises.
    """

    def __init__(self, store: Store, unit: int, number: int):
        self.store, self.unit, self.number = store, unit, number
        self.staging_dir = store.staging_dir / f"{unit}.{number}"
        self.staging_dir.mkdir()
        self._shards: dict[str, dict[str, Any]] = {}
        self._published: dict[Path, tuple[int, int, int] | None] = {}

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()

    def write(self, name: str, rows: np.ndarray) -> None:
        """Stage the unit's rows of one array.

        Args:
            rows: axis 0 up to the array's rows per unit, the rest is filled (NaN); other axes and dtype are
                the array's.
        """
        array = self.store.arrays[name]
        shape, dtype = unit_shape(array), np.dtype(array["data_type"])
        if rows.dtype != dtype or rows.shape[1:] != shape[1:] or len(rows) > shape[0]:
            raise ValueError(
                f"{name} takes up to {shape[0]} rows of {dtype} {list(shape[1:])} a unit, "
                f"not {rows.dtype} {list(rows.shape)}"
            )
        data = encode(array, rows)
        with self.store.full_disk_named(self.unit):
            write_new(self.staging_dir / name, data.data)
        file = f"{name}/c.{self.unit}" + ".0" * (len(shape) - 1)
        self._shards[name] = {"file": file, "bytes": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}

    def commit(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """Publish the unit: afterwards it is done, for good.

        Args:
            receipt: what the worker knows, as JSON: num_sequences, num_tokens, seconds, non_finite (quantity
                -> count), versions; anything more is kept too.
        Returns:
            the ledger entry: the receipt with unit, attempt, shards, host, pid and time of commit.
        Raises:
            UnitTakenError: the unit is committed, or a later attempt at it has begun.
            StoreFullError: no room. Nothing of this attempt stays in either case.
        """
        if missing := set(self.store.arrays) - set(self._shards):
            raise ValueError(f"unit {self.unit} cannot be committed without {', '.join(sorted(missing))}")
        try:
            with self.store.full_disk_named(self.unit):
                entry = self._publish(receipt)
        except OSError:
            self._withdraw()
            raise
        self.discard()
        return entry

    def fail(self, error: str) -> None:
        """Give the attempt up and keep the reason, for `status`."""
        self.discard()
        note = {"unit": self.unit, "attempt": self.number, "error": error}
        note |= {"host": platform.node(), "time": _now()}
        replace(self.store.attempts_dir / f"{self.unit}.{self.number}", json.dumps(note).encode())

    def discard(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self.staging_dir, ignore_errors=True)

    def _publish(self, receipt: dict[str, Any]) -> dict[str, Any]:
        entry = {
            **receipt,
            "unit": self.unit,
            "attempt": self.number,
            "shards": self._shards,
            "host": platform.node(),
            "pid": os.getpid(),
            "committed": _now(),
            "versions": {**receipt.get("versions", {}), "zarr": zarr.__version__, "numpy": np.__version__},
        }
        entry_path, ledger_path = self.staging_dir / "entry.json", self.store.ledger_dir / f"{self.unit}.json"
        write_new(entry_path, json.dumps(entry).encode())
        sync(self.staging_dir.iterdir())
        self._fence()
        for name, shard in self._shards.items():
            self._put(self.staging_dir / name, self.store.path / shard["file"])
        sync(self.store.path / name for name in self._shards)
        self._require_ours()
        self._put(entry_path, ledger_path)  # the commit
        sync([self.store.ledger_dir])
        self._require_ours()
        return entry

    def _fence(self) -> None:
        """Stop if a later attempt has begun, or one was committed before any file of ours was in place.

        An entry that appears once one is in place vouches for files that are not: it is an earlier attempt's,
        that was paused. It is replaced, and that attempt finds out by `_require_ours`.
        """
        later = self.store.attempts_dir / f"{self.unit}.{self.number + 1}"
        committed = self.store.ledger_dir / f"{self.unit}.json"
        if later.exists() or (not self._published and committed.exists()):
            raise self._taken()

    def _put(self, source: Path, target: Path) -> None:
        """Give a staged file its final name; what an earlier, uncommitted attempt left there is removed."""
        ours = identity(source)  # before publishing: without hard links the staged name goes away
        for _ in range(3):
            try:
                publish(source, target)
            except FileExistsError:
                if identity(target) != ours:  # equal: it was linked, and only the answer got lost
                    self._fence()
                    target.unlink(missing_ok=True)
                    continue
            self._published[target] = ours
            return
        raise self._taken()  # somebody else is publishing this unit right now

    def _require_ours(self) -> None:
        if any(identity(path) != ours for path, ours in self._published.items()):
            raise self._taken()

    def _taken(self) -> UnitTakenError:
        entry = self.store.entry(self.unit)
        what = f"was committed by attempt {entry['attempt']}" if entry else "has a later attempt"
        return UnitTakenError(f"unit {self.unit} of {self.store.path} {what}: attempt {self.number} stops")

    def _withdraw(self) -> None:
        """Take back what was published, the ledger entry first."""
        for path, ours in reversed(self._published.items()):
            if identity(path) == ours:
                path.unlink()
        self.discard()


def _to_parquet(entries: Iterable[dict[str, Any]]) -> bytes:
    """The ledger as one table, a row a unit: what sums and plots need as columns, the whole entry as JSON."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist(
        [
            {
                "unit": entry["unit"],
                "attempt": entry["attempt"],
                "num_sequences": entry["num_sequences"],
                "num_tokens": entry["num_tokens"],
                "seconds": entry["seconds"],
                "num_bytes": sum(shard["bytes"] for shard in entry["shards"].values()),
                "num_non_finite": sum(entry["non_finite"].values()),
                "host": entry["host"],
                "committed": entry["committed"],
                "entry": json.dumps(entry),
            }
            for entry in entries
        ]
    )
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
