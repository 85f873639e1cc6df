"""Writes a store unit by unit: a unit is wholly there or not there, whatever is killed and whenever.

What an attempt at a unit writes (`attempt.py`) gets its final names only when all of it is safe, and one
exclusive ledger entry, `.looptap/ledger/<u>.json`, is the commit. Units without an entry are to do.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ....errors import StoreDamagedError, StoreError
from ..group import Group, read_group
from ..keys import COMPLETE, LEDGER, STAGING, SUMMARY, attempt_key, attempt_of, entry_key, entry_unit
from ..ledger_entry import entry_bytes, parse_entry
from ..places.directory import LocalPlace
from ..places.disk import file_record
from ..places.open import open_place
from ..places.place import Place
from ..plan import StoredPlan
from .encode import encode, file_shape

_SHARD = re.compile(r"c\.(0|[1-9][0-9]{0,17})((?:\.0)*)")


class Store:
    """A store being written. Many processes may write units of it; one of them drives (`places/lock.py`)."""

    def __init__(self, place: Place, group: Group):
        self.place, self.layout = place, group
        self.document: dict[str, Any] = group.plan
        """The plan as it lies in the store, with fields that another version of looptap may have added."""
        self.plan = StoredPlan.from_json(self.document, f"the plan of {place}")
        self.num_units = self.plan.num_units
        self.metadata, self.arrays = group.metadata, group.arrays

    @classmethod
    def open(cls, path: str | Path, is_known: bool = False) -> "Store":
        """Opens a local directory or s3://bucket/prefix.

        Args:
            is_known: as for `open_place`.
        Raises:
            StoreMissingError, StoreError: there is no store of this format.
        """
        place = open_place(path, is_known)
        return cls(place, read_group(place))

    def __str__(self) -> str:
        return str(self.place)

    @property
    def path(self) -> Path:
        """The directory of a local store; raises StoreError for another."""
        if not isinstance(self.place, LocalPlace):
            raise StoreError(f"{self.place} is not a local directory")
        return self.place.path

    def zarr_store(self) -> Any:
        """What xarray.open_zarr and zarr-python open to read the store."""
        return self.place.zarr_store()

    def group(self) -> zarr.Group:
        """The store as zarr-python reads it."""
        return zarr.open_group(self.zarr_store(), mode="r", use_consolidated=True)

    def unit_rows(self, name: str) -> int:
        """Returns the rows of an array's axis 0 that one unit owns."""
        return self.arrays[name]["shape"][0] // self.num_units

    def shard_keys(self, name: str, unit: int) -> list[str]:
        """Returns the keys of the files that hold one unit's rows of an array, in the order of rows."""
        k, end = self._unit_files(name), ".0" * (len(self.arrays[name]["shape"]) - 1)
        return [f"{name}/c.{i}{end}" for i in range(unit * k, (unit + 1) * k)]

    def unit_of(self, key: str) -> int | None:
        """Returns the unit whose file has this key; None if it is no unit's file."""
        name, _, file = key.partition("/")
        match = _SHARD.fullmatch(file)
        if name not in self.arrays or match is None:
            return None
        unit = int(match[1]) // self._unit_files(name)
        is_deep_enough = len(match[2]) == 2 * (len(self.arrays[name]["shape"]) - 1)
        return unit if is_deep_enough and unit < self.num_units else None

    def _unit_files(self, name: str) -> int:
        return self.unit_rows(name) // file_shape(self.arrays[name])[0]

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one unit before compression."""
        arrays = self.arrays.values()
        sizes = (math.prod(array["shape"]) * np.dtype(array["data_type"]).itemsize for array in arrays)
        return sum(sizes) // self.num_units

    def done(self) -> list[int]:
        """Returns the units that are committed, in order."""
        units = map(entry_unit, self.place.file_names(LEDGER))
        return sorted(unit for unit in units if unit is not None and unit < self.num_units)

    def todo(self) -> list[int]:
        """Returns the units that are not committed, in order. Lists one directory and reads nothing else."""
        done = set(self.done())
        return [unit for unit in range(self.num_units) if unit not in done]

    def entry(self, unit: int) -> dict[str, Any] | None:
        """Reads a unit's ledger entry; None while it is not committed.

        Raises:
            StoreDamagedError: it is damaged.
        """
        try:
            content = self.place.read(entry_key(unit))
        except FileNotFoundError:
            return None
        files = {name: self.shard_keys(name, unit) for name in self.arrays}
        try:
            return parse_entry(content, unit, self.plan.hash, files)
        except ValueError as error:
            raise StoreDamagedError(
                f"{self}/{entry_key(unit)} cannot be read ({error}): run `looptap verify --repair {self}`"
            ) from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """Reads the ledger entries of all committed units, in order.

        Raises:
            StoreDamagedError: one is damaged.
        """
        for unit in self.done():
            if (entry := self.entry(unit)) is not None:  # or it was voided since
                yield entry

    def finish(self) -> None:
        """Closes a store whose units are all committed: checks sizes, writes `unit_done` and the summary.

        May be repeated, and killed anywhere.

        Raises:
            StoreError: units are missing, or a file has not the size its ledger entry says.
        """
        if todo := self.todo():
            raise StoreError(f"{self} lacks {len(todo)} of {self.num_units} units: capture again")
        if self.place.exists(COMPLETE):
            return
        sizes = {name: self.place.sizes(name) for name in self.arrays}
        for entry in self.entries():
            for name, shards in entry["shards"].items():
                for shard in shards:
                    size = sizes[name].get(shard["file"].partition("/")[2])
                    if size != shard["bytes"]:
                        raise StoreError(
                            f"{self}/{shard['file']} should hold {shard['bytes']} bytes of {name}, unit "
                            f"{entry['unit']}, but {'is missing' if size is None else f'holds {size}'}: "
                            f"run `looptap verify {self}`"
                        )
        with self.place.full_disk_named("the summary", 1024 * self.num_units):
            contents = {**self.marks(done=True), SUMMARY: _summary(self.entries())}
            for key, content in contents.items():
                self.place.replace(key, content)
            records = {key: file_record(content) for key, content in contents.items()}
            self.place.replace(COMPLETE, json.dumps(records).encode())
        self.clean_drafts()

    def clean_drafts(self) -> None:
        """Removes what killed attempts of this store left in their folders; to be called while no worker
        runs.
        """
        for name in self.place.names(STAGING):
            unit, _ = attempt = attempt_of(name) or (self.num_units, 0)
            if unit < self.num_units and self.place.exists(attempt_key(*attempt)):
                keys = [key for array in self.arrays for key in self.shard_keys(array, unit)]
                is_committed = self.place.exists(entry_key(unit))
                self.place.clean_draft(name, [*keys, entry_key(unit)], keys if is_committed else ())

    def check_room(self, unit: int, num_rows: dict[str, int]) -> None:
        """Looks for room for a unit before it is computed; an object store is not asked.

        Args:
            num_rows: rows that the unit fills of arrays along an axis, by the axis; of others all count.
        Raises:
            StoreFullError: there are fewer bytes than the unit takes before compression, or too few files.
        """
        if not isinstance(self.place, LocalPlace):
            return
        needed_bytes, num_files = 0, 3  # the draft's folder, the attempt, the ledger entry
        for name, array in self.arrays.items():
            rows = num_rows.get(array["dimension_names"][0], self.unit_rows(name))
            needed_bytes += rows * math.prod(array["shape"][1:]) * np.dtype(array["data_type"]).itemsize
            num_files += self.unit_rows(name) // file_shape(array)[0]
        self.place.check_room(f"unit {unit}", needed_bytes, num_files)

    def full_disk_named(self, unit: int) -> AbstractContextManager[None]:
        """Reports a full disk as StoreFullError, with what one unit takes before compression, and one that
        refuses to be written as StoreRefusedError.
        """
        return self.place.full_disk_named(f"unit {unit}", self.unit_bytes)

    def marks(self, *, done: bool) -> dict[str, bytes]:
        """Returns what the files of `unit_done` hold, by key, with all units done or none."""
        metadata = self.metadata["unit_done"]
        num_rows, *_ = file_shape(metadata)
        firsts = range(0, self.num_units, num_rows)
        parts = (np.full(min(num_rows, self.num_units - first), done, np.uint8) for first in firsts)
        contents = (encode(metadata, part).tobytes() for part in parts)
        return dict(zip(self.layout.chunk_keys("unit_done"), contents, strict=True))


def summary_rows(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of the summary, one a unit: columns for sums and plots, and the entry as JSON."""
    for entry in entries:
        yield {
            "unit": entry["unit"],
            "attempt": entry["attempt"],
            "num_sequences": entry["num_sequences"],
            "num_tokens": entry["num_tokens"],
            "seconds": entry["seconds"],
            "num_bytes": entry_bytes(entry),
            "num_non_finite": sum(entry["non_finite"].values()),
            "host": entry["host"],
            "committed": entry["committed"],
            "entry": json.dumps(entry),
        }


def _summary(entries: Iterable[dict[str, Any]]) -> bytes:
    """Returns the ledger as a table in Parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(summary_rows(entries))), sink)
    return sink.getvalue().to_pybytes()
