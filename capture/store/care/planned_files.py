"""The files that are written when a store is made, and what they must be, from what is left of their copies.

Most is there twice: the plan in `zarr.json` and `.looptap/plan.json`, an array's metadata in `zarr.json` and
its own folder, and of every file a checksum in `.looptap/files.json`. So of two copies that differ the one
whose checksum was noted is right, and a checksum that two equal copies contradict is wrong. What only the
data know (`token_id`, ...) is restored by the capture's own command (`restore.py`), and so is its checksum: a
file that is sound in itself may be another's, so it proves nothing against what was noted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ....errors import NoFileError, StoreError, StoreUnreadableError
from ..group import Group, shown_name
from ..keys import ATTEMPTS, FILES, LEDGER, PLAN, STAGING
from ..places.disk import file_record
from ..places.place import Place
from ..plan import StoredPlan
from ..writing.encode import decode, encode, file_shape
from .retry import Patience
from .settle import Record, parse, read_records, settled_group

_AT_A_TIME = 64
_Found = bytes | StoreUnreadableError | NoFileError | None  # what a file holds, or why that is not known


@dataclass
class Planned:
    """What a store's planned files are and should be."""

    group: Group
    noted: dict[str, Record]
    """What `files.json` says; empty if it says nothing that can be read."""
    records: dict[str, Record] = field(default_factory=dict)
    """What it should say."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Key -> what is wrong, of files that are damaged or missing."""
    content: dict[str, bytes] = field(default_factory=dict)
    """Key -> what it should hold, of those that can be made again from what is in the store."""
    blocked: dict[str, str] = field(default_factory=dict)
    """Key -> what is wrong, where something that is no file has the name: it is not ours to remove."""
    unread: dict[str, str] = field(default_factory=dict)
    """Key -> why it could not be read, of files of which nothing is known."""


def read_planned(place: Place, patience: Patience) -> Planned:
    """Reads the planned files of a store and says what is wrong with them; writes nothing.

    Raises:
        StoreMissingError: nothing is there.
        StoreError: there is no store of this format, or not enough is left of one to say what it was.
        StoreUnreadableError: its metadata cannot be read.
    """
    place.refuse_links([".looptap", LEDGER, ATTEMPTS, STAGING])
    noted = read_records(place, patience)
    group = settled_group(place, noted, patience)
    place.refuse_links(group.metadata)
    planned = Planned(group, noted)
    contents = {"zarr.json": group.to_bytes(), PLAN: group.plan_bytes()}
    contents |= {f"{name}/zarr.json": group.array_bytes(name) for name in group.metadata}
    for key, found in _read_each(place, list(contents), patience):
        _settle_metadata(planned, key, contents[key], found)
    for name in group.coordinates:
        if name != "unit_done":  # which is written again when a store is closed
            for key, found in _read_each(place, group.chunk_keys(name), patience):
                _settle_coordinate(planned, name, key, found)
    _settle_records(place, planned)
    return planned


def records_bytes(records: dict[str, Record]) -> bytes:
    """Returns the content of `files.json`."""
    return json.dumps(records).encode()


def derived_coordinate(plan: StoredPlan, name: str) -> np.ndarray | None:
    """Returns a coordinate that the plan alone tells; None for others."""
    model = plan.model
    stages = [(0, model.prelude, 1), (1, model.core, model.recurrences), (2, model.coda, 1)]
    steps = [
        (stage, layer, recurrence if stage == 1 else -1)
        for stage, num_layers, times in stages
        for recurrence in range(times)
        for layer in range(num_layers)
    ]
    match name:
        case "depth" | "depth_other":
            return np.arange(len(steps), dtype=np.int32)
        case "stage":
            return np.array([stage for stage, _, _ in steps], np.int8)
        case "layer":
            return np.array([layer for _, layer, _ in steps], np.int16)
        case "recurrence":
            return np.array([recurrence for _, _, recurrence in steps], np.int16)
    return None


def _read_each(place: Place, keys: list[str], patience: Patience) -> Iterator[tuple[str, _Found]]:
    """Yields the content of files, some of which are read at a time."""

    def read(key: str) -> _Found:
        try:
            return patience.read(place, key)
        except (StoreUnreadableError, NoFileError) as error:
            return error

    for first in range(0, len(keys), _AT_A_TIME):
        some = keys[first : first + _AT_A_TIME]
        yield from zip(some, place.map(read, some), strict=True)


def _settle_metadata(planned: Planned, key: str, content: bytes, found: _Found) -> None:
    if isinstance(found, StoreError):
        _put_aside(planned, key, found)
        planned.records[key] = planned.noted.get(key) or file_record(content)
        return
    if found is not None and parse(found) == parse(content):
        noted = planned.noted.get(key)
        if file_record(found) == noted or file_record(content) != noted:
            planned.records[key] = file_record(found)
            return
    planned.wrong[key] = "is missing" if found is None else _differs(found, planned.noted.get(key))
    planned.content[key], planned.records[key] = content, file_record(content)


def _put_aside(planned: Planned, key: str, error: StoreError) -> None:
    where = planned.blocked if isinstance(error, NoFileError) else planned.unread
    where[key] = str(error)


def _settle_coordinate(planned: Planned, name: str, key: str, found: _Found) -> None:
    metadata, noted = planned.group.metadata[name], planned.noted.get(key)
    if isinstance(found, StoreError):
        _put_aside(planned, key, found)
        if noted is not None:
            planned.records[key] = noted
        return
    if found is not None and noted is not None and file_record(found) == noted:
        planned.records[key] = noted
        return
    content = _derived_content(planned.group, name, key)
    if found is not None and (noted is None or found == content):
        try:
            decode(metadata, found)
            planned.records[key] = file_record(found)
            return
        except ValueError:
            pass
    planned.wrong[key] = "is missing" if found is None else _differs(found, noted)
    if content is not None and noted in (None, file_record(content)):
        planned.content[key], planned.records[key] = content, file_record(content)
    elif noted is not None:
        planned.records[key] = noted


def _settle_records(place: Place, planned: Planned) -> None:
    strange = sorted(set(planned.noted) - set(planned.group.planned_keys()))
    differ = [key for key, record in planned.records.items() if planned.noted.get(key) != record]
    if not planned.noted:
        planned.wrong[FILES] = "is damaged" if place.exists(FILES) else "is missing"
    elif strange:
        planned.wrong[FILES] = f"names {shown_name(strange[0])}, which is no file that was written with it"
    elif differ and differ[0] not in planned.wrong:
        planned.wrong[FILES] = f"says something else of {differ[0]} than what is there and sound"
    if strange or differ or FILES in planned.wrong:
        planned.content[FILES] = records_bytes(planned.records)


def _derived_content(group: Group, name: str, key: str) -> bytes | None:
    values = derived_coordinate(StoredPlan.from_json(group.plan), name)
    metadata = group.metadata[name]
    if (
        values is None
        or list(values.shape) != metadata["shape"]
        or str(values.dtype) != metadata["data_type"]
    ):
        return None
    first = group.chunk_keys(name).index(key) * file_shape(metadata)[0]
    return encode(metadata, values[first : first + file_shape(metadata)[0]]).tobytes()


def _differs(found: bytes, noted: Record | None) -> str:
    if noted is None:
        return "is damaged"
    if len(found) != noted["bytes"]:
        return f"holds {len(found)} bytes, {noted['bytes']} were written"
    return f"crc32c is {file_record(found)['crc32c']}, {noted['crc32c']} was written"
