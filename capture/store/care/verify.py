"""Verifies a store: compares every piece of it with the checksums that were noted when it was written.

Three things are kept apart: what was read and is wrong, or is not there (`problems`); what could not be read,
of which nothing is known (`unread`); and what lies in the store and is none of its files (`foreign`).
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from ....errors import NoFileError, StoreDamagedError, StoreUnreadableError
from ..keys import (
    entry_key,
)
from ..places.open import open_place
from ..writing.commit import Store
from .closing import check_closing
from .examined import Examined, Problem, Written
from .planned_files import Planned, read_planned
from .retry import Patience
from .strangers import look_around

_READ_BYTES = 8 << 20
_NUM_READERS = 8


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
    check_closing(found, patience)
    look_around(found, patience)
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
                found.written.append(Written(unit, shard["file"], shard["bytes"], shard["pieces"]))
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
    store: Store, sizes: dict[str, int], file: Written, patience: Patience
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


def _wrong_piece(store: Store, file: Written, patience: Patience) -> str | None:
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
