"""The ledger entry of a unit: what commits it, and says what its files are.

docs/store-format.md has its fields.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import google_crc32c
import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _File(msgspec.Struct):
    file: str
    bytes: _Count
    pieces: list[tuple[_Count, _Count, str]]


class _Entry(msgspec.Struct):
    unit: _Count
    attempt: Annotated[int, msgspec.Meta(ge=1)]
    plan: str
    num_sequences: _Count
    num_tokens: _Count
    non_finite: dict[str, _Count]
    seconds: _Seconds
    shards: dict[str, list[_File]]
    host: str
    committed: str
    checksum: str
    model_seconds: _Seconds = 0.0
    versions: dict[str, str] = {}


def parse_entry(content: bytes, unit: int, plan_hash: str, files: Mapping[str, list[str]]) -> dict[str, Any]:
    """Reads an entry.

    Args:
        files: array -> the keys of the unit's files, in the order of rows.
    Raises:
        ValueError: it is damaged, or of another unit, plan or layout.
    """
    try:
        entry = json.loads(content)
    except RecursionError:
        raise ValueError("it is not what was written") from None
    try:
        known = msgspec.convert(entry, _Entry)
    except msgspec.ValidationError as error:
        raise ValueError(f"it is not what was written: {error}") from None
    if known.checksum != entry_checksum(entry):
        raise ValueError("it is not what was written")
    if known.unit != unit:
        raise ValueError(f"it is of unit {known.unit}")
    if known.plan != plan_hash:
        raise ValueError("it is of another plan")
    if {name: [file.file for file in of] for name, of in known.shards.items()} != files:
        raise ValueError("it names other files than this unit's")
    for file in (file for of in known.shards.values() for file in of):
        end = 0
        for first, num_bytes, _ in file.pieces:
            if first < end:
                raise ValueError(f"pieces of {file.file} overlap")
            end = first + num_bytes
        if end > file.bytes:
            raise ValueError(f"{file.file} is shorter than its pieces")
    return entry


def entry_checksum(entry: Mapping[str, Any]) -> str:
    """Returns the crc32c of a ledger entry without its checksum, eight hex digits."""
    text = json.dumps({name: value for name, value in entry.items() if name != "checksum"})
    return f"{google_crc32c.value(text.encode()):08x}"


def entry_bytes(entry: Mapping[str, Any]) -> int:
    """Returns the bytes of a unit in the store, from its ledger entry."""
    return sum(shard["bytes"] for shards in entry["shards"].values() for shard in shards)
