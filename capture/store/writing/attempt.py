"""One attempt at a unit, from its first byte to the ledger entry that commits it.

Attempts are numbered. Each first says that it has begun, then looks for an entry; or enters, then looks for
a later attempt: of two, one sees the other, whenever either is paused. One that sees a later one stops, and
withdraws its entry if it has one. If it is killed before it can, an entry stays that is of an attempt before
the last: `care.repair.clean` looks at those when a driver starts.
"""

import datetime
import json
import os
import platform
from typing import Any

import numpy as np
import zarr

from ....errors import UnitTakenError
from ..keys import attempt_key, entry_key
from ..ledger_entry import entry_checksum
from ..places.place import Sink
from .commit import Store
from .encode import write_array
from .shard import ShardWriter


def begin_attempt(store: Store, unit: int) -> "Attempt":
    """Starts an attempt at a unit, numbered above all before it.

    Raises:
        UnitTakenError: the unit is committed already.
        StoreRefusedError, StoreFullError: the place cannot be written.
    """
    if not 0 <= unit < store.num_units:
        raise ValueError(f"unit {unit} is not in the plan: it has units 0 to {store.num_units - 1}")
    with store.full_disk_named(unit):
        if store.place.exists(entry_key(unit)):
            raise UnitTakenError(f"unit {unit} of {store} is committed: nothing is left to do for it")
        number = 1
        while True:
            try:
                # numbers have no gaps, so the first free one is above all others
                store.place.create(attempt_key(unit, number), b"")
                break
            except FileExistsError:
                number += 1
        return Attempt(store, unit, number)


class Attempt:
    """`write` or `open_writer` every array of the store once, then `commit`.

    As a context manager it cleans up after itself if the body raises. Whatever meets a full disk, or one that
    cannot be written, raises StoreFullError or StoreRefusedError.
    """

    def __init__(self, store: Store, unit: int, number: int):
        self.store, self.unit, self.number = store, unit, number
        self.draft = store.place.begin(unit, number)
        self._entry_key = entry_key(unit)
        self._shards: dict[str, list[dict[str, Any]]] = {}
        self._writers: dict[str, ShardWriter] = {}
        self._published: list[str] = []

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()

    def write(self, name: str, rows: np.ndarray) -> None:
        """Writes the unit's rows of one array.

        Args:
            rows: axis 0 up to the array's rows per unit, the rest is filled (NaN); other axes and dtype are
                the array's.
        """
        array, num_rows = self.store.arrays[name], self.store.unit_rows(name)
        shape, dtype = array["shape"], np.dtype(array["data_type"])
        if rows.dtype != dtype or list(rows.shape[1:]) != shape[1:] or len(rows) > num_rows:
            raise ValueError(
                f"{name} takes up to {num_rows} rows of {dtype} {shape[1:]} a unit, "
                f"not {rows.dtype} {list(rows.shape)}"
            )
        with self.store.full_disk_named(self.unit):
            self._record(name, write_array(array, rows, self._open_sinks(name)))

    def open_writer(self, name: str, **options: Any) -> ShardWriter:
        """Writes one array piece by piece; it is closed at commit.

        Args:
            options: options of ShardWriter.
        """
        with self.store.full_disk_named(self.unit):
            sinks = self._open_sinks(name)
        self._writers[name] = ShardWriter(self.store.arrays[name], sinks, **options)
        return self._writers[name]

    def commit(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """Publishes the unit: afterwards it is done, for good.

        Args:
            receipt: what the worker knows, as JSON: num_sequences, num_tokens, seconds, non_finite (quantity
                -> count), versions; anything more is kept too.
        Returns:
            the ledger entry: the receipt with unit, attempt, shards, host, pid and time of commit.
        Raises:
            UnitTakenError: the unit is committed, or a later attempt at it has begun.
            StoreFullError, StoreRefusedError: no room, or the place cannot be written. Nothing of this
                attempt stays in any case, but what a later one replaces; or, where not even that can be
                taken back, what the next replaces.
        """
        if missing := set(self.store.arrays) - set(self._shards) - set(self._writers):
            raise ValueError(f"unit {self.unit} cannot be committed without {', '.join(sorted(missing))}")
        try:
            with self.store.full_disk_named(self.unit):
                for name in list(self._writers):
                    self._record(name, self._writers.pop(name).close())
                entry = self._publish(receipt)
        except OSError as error:
            try:
                self._withdraw()
            except OSError as kept:
                error.add_note(f"what was published of it could not be taken back: {kept}")
            raise
        self.discard()
        return entry

    def fail(self, error: str) -> None:
        """Gives the attempt up and writes down the reason, for `status`.

        Raises:
            StoreFullError, StoreRefusedError: that cannot be written; the message has the reason.
        """
        self.discard()
        note = {"unit": self.unit, "attempt": self.number, "error": error}
        note |= {"host": platform.node(), "time": _now()}
        data = json.dumps(note).encode()
        with self.store.place.full_disk_named(f"why unit {self.unit} failed ({error})", len(data)):
            self.store.place.replace(attempt_key(self.unit, self.number), data)

    def discard(self) -> None:
        """Removes what was staged."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        self.draft.discard()

    def _open_sinks(self, name: str) -> list[Sink]:
        sinks = (self.draft.open_sink(key) for key in self.store.shard_keys(name, self.unit))
        return [_NamedSink(sink, self.store, self.unit) for sink in sinks]

    def _record(self, name: str, shards: list[dict[str, Any]]) -> None:
        keys = self.store.shard_keys(name, self.unit)
        self._shards[name] = [{"file": key, **shard} for key, shard in zip(keys, shards, strict=True)]

    def _publish(self, receipt: dict[str, Any]) -> dict[str, Any]:
        entry = {
            **receipt,
            "unit": self.unit,
            "attempt": self.number,
            "plan": self.store.plan.hash,
            "shards": self._shards,
            "host": platform.node(),
            "pid": os.getpid(),
            "committed": _now(),
            "versions": {**receipt.get("versions", {}), "zarr": zarr.__version__, "numpy": np.__version__},
        }
        entry["checksum"] = entry_checksum(entry)
        self.draft.write(self._entry_key, json.dumps(entry).encode())
        self.draft.sync()
        self._fence()
        first, *others = [shard["file"] for shards in self._shards.values() for shard in shards]
        self._put(first)  # alone: from then on an earlier attempt's entry is known to be void
        self.store.place.map(self._put, others)
        self.draft.sync_published([first, *others])
        self._require_ours()
        self._put(self._entry_key)  # the commit
        self.draft.sync_published([self._entry_key])
        if self._has_later():  # it began before it could see the entry, and may be replacing files
            raise self._taken()
        self._require_ours()
        return entry

    def _fence(self) -> None:
        """Stops if a later attempt has begun, or one was committed before any file of ours was in place.

        An entry that appears once one is in place vouches for files that are not: it is an earlier attempt's,
        that was paused. It is replaced, and that attempt finds out by `_require_ours`.
        """
        if self._has_later() or (not self._published and self.store.place.exists(self._entry_key)):
            raise self._taken()

    def _put(self, key: str) -> None:
        """Gives a file its final name; what an earlier, uncommitted attempt left there goes away."""
        try:
            self.draft.publish(key, self._fence)
        except FileExistsError:
            raise self._taken() from None  # somebody else is publishing this unit right now
        self._published.append(key)

    def _require_ours(self) -> None:
        if not all(self.store.place.map(self.draft.holds, self._published)):
            raise self._taken()

    def _has_later(self) -> bool:
        return self.store.place.exists(attempt_key(self.unit, self.number + 1))

    def _taken(self) -> UnitTakenError:
        entry = self.store.entry(self.unit)
        what = f"was committed by attempt {entry['attempt']}" if entry else "has a later attempt"
        return UnitTakenError(f"unit {self.unit} of {self.store} {what}: attempt {self.number} stops")

    def _withdraw(self) -> None:
        """Takes back what was published, the ledger entry first.

        If a later attempt has begun, it replaces the rest, and may have: that is left to it. An earlier one's
        entry that came meanwhile vouches for files that were replaced, and goes too.
        """
        if self._published:
            if self._published[-1] == self._entry_key:
                self.draft.withdraw(self._published.pop())
            if not self._has_later():
                self.store.place.remove([self._entry_key])
                for key in self._published:
                    self.draft.withdraw(key)
        self.discard()


class _NamedSink:
    """A sink that names its unit in the error for a full disk, which comes up in a writing thread."""

    def __init__(self, sink: Sink, store: Store, unit: int):
        self._sink, self._store, self._unit = sink, store, unit

    def write_at(self, offset: int, data: Any) -> None:
        with self._store.full_disk_named(self._unit):
            self._sink.write_at(offset, data)

    def close(self, num_bytes: int) -> None:
        with self._store.full_disk_named(self._unit):
            self._sink.close(num_bytes)

    def discard(self) -> None:
        self._sink.discard()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
