"""Verifies a store: compares every piece of it with the checksums that were noted when it was written.

Three things are kept apart: what was read and is wrong, or is not there (`problems`); what could not be read,
of which nothing is known (`unread`); and what lies in the store and is none of its files (`foreign`).
"""

import io
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ....errors import NoFileError, StoreDamagedError, StoreUnreadableError
from ..group import shown_name
from ..keys import (
    ATTEMPTS,
    COMPLETE,
    DRIVER_LOCK,
    FILES,
    GUARD,
    LEDGER,
    MAKING,
    STAGING,
    SUMMARY,
    attempt_of,
    entry_key,
    entry_unit,
    passing_for,
)
from ..places.disk import file_record
from ..places.open import open_place
from ..writing.commit import Store, summary_rows
from ..writing.encode import decode
from .planned_files import Planned, read_planned
from .retry import Patience

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
    """Files that were read and are not what was written, or that are not there."""
    unread: list[Problem]
    """Files that could not be read, though it was tried again: they may be sound."""
    uncommitted: list[str]
    """Files of units without a ledger entry, and others that a killed process left: the next run, or a
    repair, replaces or removes them."""
    drafts: list[str]
    """Folders in which attempts write, or wrote when they were killed."""
    foreign: list[str]
    """Names in the store that are none of its files; nobody reads them, and they are left alone."""
    num_files: int
    num_bytes: int

    @property
    def ok(self) -> bool:
        """Whether everything that is committed was read and is sound; units may be missing."""
        return not self.problems and not self.unread


@dataclass
class Examined:
    """A store as it was found: what `verify_store` reports, and what a repair needs to know."""

    store: Store
    planned: Planned
    done: list[int]
    problems: list[Problem] = field(default_factory=list)
    blocked: list[Problem] = field(default_factory=list)
    """Things that are no files under names of files: nothing can be done before they are moved away."""
    unread: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """Keys of files that killed processes left, which may be removed."""
    drafts: list[str] = field(default_factory=list)
    """Keys of folders in which attempts write, or wrote."""
    foreign: list[str] = field(default_factory=list)
    written: "list[_Written]" = field(default_factory=list)


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
    A read that fails is tried again for some seconds.

    Raises:
        StoreMissingError: nothing is there.
        StoreError: there is no store of this format, or not enough is left to say what it was.
    """
    found = examine(path)
    done = set(found.done)
    planned_bytes = sum(record["bytes"] for record in found.planned.records.values())
    return Report(
        path=str(found.store),
        units_done=found.done,
        units_missing=[unit for unit in range(found.store.num_units) if unit not in done],
        problems=[*found.problems, *found.blocked],
        unread=found.unread,
        uncommitted=found.leftovers,
        drafts=found.drafts,
        foreign=found.foreign,
        num_files=len(found.written) + len(found.planned.records),
        num_bytes=sum(file.num_bytes for file in found.written) + planned_bytes,
    )


def examine(path: str | Path) -> Examined:
    """Reads all of a store; see `verify_store`."""
    place, patience = open_place(path), Patience()
    planned = read_planned(place, patience)
    store = Store(place, planned.group)
    found = Examined(store, planned, patience.ask(store.done))
    found.problems += [Problem(None, key, what) for key, what in planned.wrong.items()]
    found.blocked += [Problem(None, key, what) for key, what in planned.blocked.items()]
    found.unread += [Problem(None, key, what) for key, what in planned.unread.items()]
    _check_units(found, found.done, patience)
    _check_closing(found, patience)
    _look_around(found, patience)
    return found


def check_units(store: Store, units: list[int]) -> list[Problem]:
    """Returns what is wrong with these committed units; nothing of files that could not be read."""
    found = Examined(store, Planned(store.layout, {}), units)
    _check_units(found, units, Patience())
    return found.problems


def _check_units(found: Examined, units: list[int], patience: Patience) -> None:
    store = found.store
    for unit in units:
        try:
            entry = patience.ask(lambda unit=unit: store.entry(unit))
        except StoreUnreadableError as error:
            found.unread.append(Problem(unit, entry_key(unit), str(error)))
        except StoreDamagedError as error:
            found.problems.append(
                Problem(unit, entry_key(unit), f"cannot be read ({error.__cause__ or error})")
            )
        else:
            for shard in (shard for of in entry["shards"].values() for shard in of) if entry else ():
                found.written.append(_Written(unit, shard["file"], shard["bytes"], shard["pieces"]))
    sizes, unlisted = _sizes(store, {file.key.partition("/")[0] for file in found.written}, patience)
    to_read = []
    for file in found.written:
        folder = file.key.partition("/")[0]
        if folder in unlisted:
            found.unread.append(Problem(file.unit, file.key, unlisted[folder]))
        else:
            to_read.append(file)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for file, answer in zip(
            to_read, pool.map(lambda file: _check_file(store, sizes, file, patience), to_read), strict=True
        ):
            if isinstance(answer, NoFileError):
                found.blocked.append(Problem(None, file.key, str(answer)))
            elif isinstance(answer, StoreUnreadableError):
                found.unread.append(Problem(file.unit, file.key, str(answer)))
            elif answer is not None:
                found.problems.append(Problem(file.unit, file.key, answer))


def _sizes(
    store: Store, folders: Collection[str], patience: Patience
) -> tuple[dict[str, int], dict[str, str]]:
    """Returns the bytes of all files in these folders, by key; and why a folder could not be listed."""
    sizes: dict[str, int] = {}
    unlisted: dict[str, str] = {}
    for folder in sorted(folders):
        try:
            listed = patience.ask(lambda folder=folder: store.place.sizes(folder))
        except StoreUnreadableError as error:
            unlisted[folder] = str(error)
        else:
            sizes |= {f"{folder}/{name}": size for name, size in listed.items()}
    return sizes, unlisted


def _check_file(
    store: Store, sizes: dict[str, int], file: _Written, patience: Patience
) -> str | StoreUnreadableError | NoFileError | None:
    """Returns what is wrong with a file, or why that is not known; None if it is sound."""
    num_bytes = sizes.get(file.key)
    try:
        if num_bytes is None:
            patience.ask(lambda: store.place.read_range(file.key, 0, 1))
            raise StoreUnreadableError(f"{file.key} came while it was looked for")
        if num_bytes != file.num_bytes:
            return f"holds {num_bytes} bytes, {file.num_bytes} were written"
        if _wrong_piece(store, file, patience) is None:
            return None
        return _wrong_piece(store, file, patience)  # bytes that come right the second time were read wrongly
    except FileNotFoundError:
        return "is missing"
    except (StoreUnreadableError, NoFileError) as error:
        return error


def _wrong_piece(store: Store, file: _Written, patience: Patience) -> str | None:
    start, block = 0, b""
    for offset, length, wanted in file.pieces:
        value, at, end = 0, offset, offset + length
        while at < end:
            if not start <= at < start + len(block):
                size = min(_READ_BYTES, file.num_bytes - at)
                block = patience.ask(lambda at=at, size=size: store.place.read_range(file.key, at, size))
                start = at
            part = block[at - start : end - start]
            if not part:
                return f"ends at {at}, {file.num_bytes} bytes were written"
            value, at = google_crc32c.extend(value, part), at + len(part)
        if (crc := f"{value:08x}") != wanted:
            where = "" if length == file.num_bytes else f" of {length} bytes at {offset}"
            return f"crc32c{where} is {crc}, {wanted} was written"
    return None


def _check_closing(found: Examined, patience: Patience) -> None:
    """Checks what `Store.finish` wrote, against the ledger and against what it noted of it."""
    store, done = found.store, found.done
    is_whole = len(done) == store.num_units
    try:
        noted = patience.read(store.place, COMPLETE)
        marks = {key: patience.read(store.place, key) for key in store.layout.chunk_keys("unit_done")}
        if noted is None:
            if is_whole and store.place.exists(SUMMARY):
                found.problems.append(Problem(None, COMPLETE, "is missing, and every unit is there"))
            for key, content in marks.items():
                if content is not None and (what := _undecodable(store, content)):
                    found.problems.append(Problem(None, key, what))
            return
        summary = patience.read(store.place, SUMMARY)
    except (StoreUnreadableError, NoFileError) as error:
        where = found.blocked if isinstance(error, NoFileError) else found.unread
        where.append(Problem(None, "what closes the store", str(error)))
        return
    if not is_whole:
        what = f"says that the store is complete, the ledger has {len(done)} of {store.num_units} units"
        found.problems.append(Problem(None, COMPLETE, what))
        return
    records = _closing_records(store, noted)
    if records is None:
        found.problems.append(Problem(None, COMPLETE, "is not what was written"))
    for key, content in marks.items():
        if what := _wrong_marks(store, content, (records or {}).get(key)):
            found.problems.append(Problem(None, key, what))
    is_ledger_sound = all(problem.unit is None for problem in (*found.problems, *found.unread))
    if is_ledger_sound and (what := _wrong_summary(store, summary, (records or {}).get(SUMMARY))):
        found.problems.append(Problem(None, SUMMARY, what))


def _closing_records(store: Store, noted: bytes) -> dict[str, Any] | None:
    """Returns what `complete` notes of the files that close a store; None if it is damaged."""
    if not noted and not store.metadata["unit_done"]["codecs"][-1].get("configuration", {}).get("checksum"):
        return {}  # as looptap 0.1 wrote it
    try:
        records = json.loads(noted)
        return records if set(records) == {SUMMARY, *store.layout.chunk_keys("unit_done")} else None
    except (ValueError, TypeError, RecursionError):
        return None


def _wrong_marks(store: Store, content: bytes | None, record: dict[str, Any] | None) -> str | None:
    if content is None:
        return "is missing"
    if record is not None and record != file_record(content):
        return "is not what was written"
    if what := _undecodable(store, content):
        return what
    marks = decode(store.metadata["unit_done"], content)
    return None if marks.all() else f"marks {np.count_nonzero(marks)} units, the ledger has all"


def _undecodable(store: Store, content: bytes) -> str | None:
    try:
        decode(store.metadata["unit_done"], content)
    except ValueError as error:
        return f"is damaged: {error}"
    return None


def _wrong_summary(store: Store, content: bytes | None, record: dict[str, Any] | None) -> str | None:
    if content is None:
        return "is missing"
    if record is not None:
        return None if record == file_record(content) else "is not what was written"
    import pyarrow as pa
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"cannot be read ({error})"
    return None if rows == list(summary_rows(store.entries())) else "says something else than the ledger"


def _look_around(found: Examined, patience: Patience) -> None:
    """Finds what is in the store's folders and is none of its files, or was left by a killed process."""
    store, done = found.store, set(found.done)
    folders = {".looptap", LEDGER, ATTEMPTS, STAGING, *store.metadata}
    files = {*store.layout.planned_keys(), *store.layout.chunk_keys("unit_done")}
    files |= {FILES, COMPLETE, SUMMARY, DRIVER_LOCK, GUARD}

    def is_known(key: str) -> bool:
        folder, _, name = key.rpartition("/")
        number = entry_unit(name) if folder == LEDGER else (attempt_of(name) or (None,))[0]
        if folder in (LEDGER, ATTEMPTS):
            return number is not None and number < store.num_units
        return key in files or store.unit_of(key) is not None

    for folder in ["", *sorted(folders)]:
        try:
            names = patience.ask(lambda folder=folder: store.place.names(folder))
            file_names = set(patience.ask(lambda folder=folder: store.place.file_names(folder)))
        except StoreUnreadableError as error:
            found.unread.append(Problem(None, folder or ".", str(error)))
            continue
        for name in sorted(names):
            key = f"{folder}/{name}".lstrip("/")
            if name not in file_names:
                attempt = attempt_of(name) if folder == STAGING else None
                if attempt is not None and attempt[0] < store.num_units:
                    found.drafts.append(key)
                elif key not in folders:
                    found.foreign.append(shown_name(key))
                continue
            of, unit = passing_for(name), store.unit_of(key)
            is_passing = key == MAKING or (of is not None and is_known(f"{folder}/{of}".lstrip("/")))
            if is_passing or (unit is not None and unit not in done):
                found.leftovers.append(key)
            elif not is_known(key) and not name.startswith(".nfs"):  # a deleted file that somebody has open
                found.foreign.append(shown_name(key))
