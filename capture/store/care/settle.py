"""The group's metadata as they were written, from what is left of `zarr.json` and of the copies of its parts.

The plan is in `zarr.json` and in `.looptap/plan.json`, an array's metadata in `zarr.json` and in its own
folder. Of two copies that differ the one whose checksum was noted is right.
"""

import json
from typing import Any

from ....errors import NoFileError, StoreError
from ..array_metadata import COORDINATE_AXES, check_array
from ..group import Group, check_group, no_store, parse_group, remains_of
from ..keys import ARRAY_NAME, FILES, PLAN
from ..places.disk import file_record
from ..places.place import Place
from ..plan import StoredPlan
from ..quantities import QUANTITIES
from .retry import Patience

_BACKUP = "copy one of them from a backup"

Record = dict[str, Any]
"""`bytes` and `crc32c` of a file, as `file_record` makes it."""


def _read_copy(place: Place, key: str, patience: Patience) -> bytes | None:
    """Returns one of two copies; None where something that is no file has its name."""
    try:
        return patience.read(place, key)
    except NoFileError:
        return None


def settled_group(place: Place, noted: dict[str, Record], patience: Patience) -> Group:
    """Returns the group as it was written, from `zarr.json` and from the copies of its parts."""
    root = patience.read(place, "zarr.json")
    if root is not None and noted.get("zarr.json") == file_record(root):
        return parse_group(root, str(place))
    try:
        group = None if root is None else parse_group(root, str(place))
    except StoreError as error:
        if not place.exists(PLAN):
            why = str(error).partition(": run ")[0]
            raise StoreError(
                f"{why}, and {PLAN}, which has a copy of the plan, is missing: {_BACKUP}"
            ) from error
        group, said = None, error
    else:
        said = None
    names = place.names("")
    if root is None and remains_of(place, names) is None:
        raise no_store(place)
    hopeless = f"{place} cannot be made whole from what is in it"
    plan = _settled_plan(place, group, noted, patience)
    if plan is None:
        raise StoreError(f"{hopeless}: zarr.json and {PLAN} are both damaged: {_BACKUP}")
    metadata: dict[str, dict[str, Any]] = {}
    wanted = plan.get("settings", {}).get("quantities", ()) if isinstance(plan.get("settings"), dict) else ()
    for name in _array_names(group, noted, names, wanted):
        found = _settled_array(place, name, group, noted, patience)
        if found is None:
            raise StoreError(
                f"{hopeless}: {name}/zarr.json and its copy in zarr.json are both damaged: {_BACKUP}"
            )
        metadata[name] = found
    if group is not None:
        coordinates = group.coordinates
    else:
        with_chunks = {key.partition("/")[0] for key in noted if "/c." in key} | {"unit_done"}
        are = with_chunks if noted else set(metadata) - set(QUANTITIES)
        coordinates = tuple(name for name in metadata if name in are)
    settled = Group(plan, coordinates, metadata)
    try:
        check_group(settled, str(place))
    except StoreError as error:
        raise StoreError(f"{hopeless}: {said or error}") from error
    return settled


def _settled_plan(
    place: Place, group: Group | None, noted: dict[str, Record], patience: Patience
) -> dict[str, Any] | None:
    content = _read_copy(place, PLAN, patience)
    copy = None if content is None else parse(content)
    if content is not None and isinstance(copy, dict) and noted.get(PLAN) == file_record(content):
        return copy
    copies = [document for document in (group and group.plan, copy) if isinstance(document, dict)]
    if len(copies) == 2 and copies[0] == copies[1]:
        return copies[0]
    sound = [document for document in copies if _has_its_hash(document)]
    return sound[0] if sound else copies[0] if len(copies) == 1 and group is not None else None


def _settled_array(
    place: Place, name: str, group: Group | None, noted: dict[str, Record], patience: Patience
) -> dict[str, Any] | None:
    key = f"{name}/zarr.json"
    content = _read_copy(place, key, patience)
    own = None if content is None else parse(content)
    if content is not None and isinstance(own, dict) and noted.get(key) == file_record(content):
        return own
    copies = [array for array in (group and group.metadata.get(name), own) if _is_array(name, array)]
    for array in copies:  # the one of which the checksum was noted
        if file_record(json.dumps(array, indent=2).encode()) == noted.get(key):
            return array
    if len(copies) == 1:
        return copies[0] if key not in noted else None
    return copies[0] if copies and copies[0] == copies[1] else None


def _array_names(
    group: Group | None, noted: dict[str, Record], names: list[str], quantities: Any
) -> list[str]:
    """Returns the names of all arrays, in the order in which a capture writes them."""
    if group is not None:
        return list(group.metadata)
    found = {key.partition("/")[0] for key in noted if key.endswith("/zarr.json")}
    if not found:
        found = {name for name in names if name in COORDINATE_AXES or name in quantities}
    order = dict.fromkeys([*COORDINATE_AXES, *quantities, *QUANTITIES])
    known = [name for name in order if name in found]
    return [*known, *sorted(name for name in found - set(known) if ARRAY_NAME.fullmatch(name))]


def read_records(place: Place, patience: Patience) -> dict[str, Record]:
    """Returns the notes of `files.json` that read as such; empty if there are none."""
    content = _read_copy(place, FILES, patience)
    files = None if content is None else parse(content)
    if not isinstance(files, dict):
        return {}
    return {key: record for key, record in files.items() if _is_record(record)}


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and set(record) == {"bytes", "crc32c"}
        and type(record["bytes"]) is int
        and isinstance(record["crc32c"], str)
    )


def _is_array(name: str, array: Any) -> bool:
    try:
        check_array(name, array)
    except ValueError:
        return False
    return True


def _has_its_hash(document: dict[str, Any]) -> bool:
    """Whether a plan's fields have the hash that it says."""
    try:
        plan = StoredPlan.from_json({**document, "hash": None}, "it")
    except StoreError:
        return False
    return plan.hash == document.get("hash")


def parse(content: bytes) -> Any:
    """Returns the JSON of a file; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
