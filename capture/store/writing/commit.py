"""Writes a store unit by unit: a unit is wholly there or not there, whatever is killed and whenever.

What an attempt at a unit writes (`attempt.py`) gets its final names only when all of it is safe, and one
exclusive ledger entry, `.looptap/ledger/<u>.json`, is the commit. Units without an entry are to do.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from ....errors import StoreError
from ..keys import COMPLETE, LEDGER, SUMMARY, entry_key
from ..layout import read_group, unit_arrays
from ..places.directory import LocalPlace
from ..places.open import open_place
from ..places.place import Place
from ..plan import StoredPlan
from .encode import encode, file_shape


class Store:
    """A store being written. Many processes may write units of it; one of them drives (`places/lock.py`)."""

    def __init__(self, place: Place, group: dict[str, Any]):
        self.place = place
        self.document: dict[str, Any] = group["attributes"]["plan"]
        """The plan as it lies in the store, with fields that another version of looptap may have added."""
        self.plan = StoredPlan.from_json(self.document, f"the plan of {place}")
        self.num_units = self.plan.num_units
        self.metadata: dict[str, dict[str, Any]] = group["consolidated_metadata"]["metadata"]
        self.arrays = unit_arrays(group)

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
        shard_rows, *_ = shape = file_shape(self.arrays[name])
        k = self.unit_rows(name) // shard_rows
        return [f"{name}/c.{i}" + ".0" * (len(shape) - 1) for i in range(unit * k, (unit + 1) * k)]

    @cached_property
    def unit_bytes(self) -> int:
        """Bytes of one unit before compression."""
        arrays = self.arrays.values()
        sizes = (math.prod(array["shape"]) * np.dtype(array["data_type"]).itemsize for array in arrays)
        return sum(sizes) // self.num_units

    def done(self) -> list[int]:
        """Returns the units that are committed, in order."""
        stems = (name[:-5] for name in self.place.names(LEDGER) if name.endswith(".json"))
        return sorted(unit for unit in map(int, filter(str.isdecimal, stems)) if unit < self.num_units)

    def todo(self) -> list[int]:
        """Returns the units that are not committed, in order. Lists one directory and reads nothing else."""
        done = set(self.done())
        return [unit for unit in range(self.num_units) if unit not in done]

    def entry(self, unit: int) -> dict[str, Any] | None:
        """Reads a unit's ledger entry; None while it is not committed.

        Raises:
            StoreError: it is damaged.
        """
        try:
            return json.loads(self.place.read(entry_key(unit)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{self}/{entry_key(unit)} cannot be read ({error}): run `looptap verify --repair {self}`"
            ) from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """Reads the ledger entries of all committed units, in order."""
        for unit in self.done():
            yield cast(dict[str, Any], self.entry(unit))

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
            self._write_unit_done()
            self.place.replace(SUMMARY, _to_parquet(self.entries()))
            self.place.replace(COMPLETE, b"")
        self.place.clean_drafts()

    def full_disk_named(self, unit: int) -> AbstractContextManager[None]:
        """Reports a full disk as StoreFullError, with what one unit takes before compression."""
        return self.place.full_disk_named(f"unit {unit}", self.unit_bytes)

    def _write_unit_done(self) -> None:
        metadata = json.loads(self.place.read("unit_done/zarr.json"))
        (num_rows,) = file_shape(metadata)
        for index, first in enumerate(range(0, self.num_units, num_rows)):
            done = np.ones(min(num_rows, self.num_units - first), np.uint8)
            self.place.replace(f"unit_done/c.{index}", encode(metadata, done).tobytes())


def _to_parquet(entries: Iterable[dict[str, Any]]) -> bytes:
    """Returns the ledger as a table, a row a unit: columns for sums and plots, and the entry as JSON."""
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
                "num_bytes": entry_bytes(entry),
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


def entry_bytes(entry: dict[str, Any]) -> int:
    """Returns the bytes of a unit in the store, from its ledger entry."""
    return sum(shard["bytes"] for shards in entry["shards"].values() for shard in shards)
