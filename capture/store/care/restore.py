"""Coordinates that were lost or damaged, written again by a driver, which knows them from its data."""

from collections.abc import Mapping

import numpy as np

from ....errors import NoFileError, OtherPlanError
from ..keys import FILES
from ..layout import Coordinate
from ..places.disk import file_record
from ..writing.commit import Store
from ..writing.encode import decode, encode, file_shape
from .planned_files import read_planned, records_bytes
from .retry import Patience


def restore_planned(store: Store, coordinates: Mapping[str, Coordinate]) -> list[str]:
    """Compares what was written when the store was made with what its driver knows; writes again what
    differs, before a worker goes by it.

    For the driver alone, while no worker runs.

    Args:
        coordinates: as they were given to `create_store`.
    Returns:
        keys of the files that were written again.
    Raises:
        StoreUnreadableError: a file can be neither read nor known to be lost.
        NoFileError: something that is no file has the name of one.
        OtherPlanError: a coordinate is what was written, and not what the data say now.
    """
    place, patience = store.place, Patience()
    planned = read_planned(place, patience)
    for what in planned.blocked.values():
        raise NoFileError(what)
    known = {name: values for name, (_, values, _) in coordinates.items() if name in store.metadata}
    for name, values in known.items():
        metadata, rows = store.metadata[name], file_shape(store.metadata[name])[0]
        for index, key in enumerate(store.layout.chunk_keys(name)):
            part = np.asarray(values)[index * rows : (index + 1) * rows]
            wanted = encode(metadata, part).tobytes()
            is_sound = key not in planned.wrong and key not in planned.unread
            if is_sound and planned.records.get(key) == file_record(wanted):
                continue
            found = patience.read(place, key)
            if found is not None and found != wanted and _holds(metadata, found, decode(metadata, wanted)):
                wanted = found  # another zstd wrote it
            if found not in (None, wanted) and planned.noted.get(key) == file_record(found):
                raise OtherPlanError(
                    f"{store} holds another {name} than the data give now, and it is what was written: the "
                    "tokenizer's library may have changed since; capture with its old version (`looptap info "
                    "STORE` has it), or into another store"
                )
            if found == wanted:
                planned.content.pop(key, None)
            else:
                planned.content[key] = wanted
            planned.records[key] = file_record(wanted)
    content = {key: data for key, data in planned.content.items() if key != FILES}
    if planned.records != planned.noted:
        content[FILES] = records_bytes(planned.records)  # last
    place.restore_folders(store.metadata)
    for key, data in content.items():
        place.replace(key, data)
    return sorted(content)


def _holds(metadata: dict[str, object], content: bytes, values: np.ndarray) -> bool:
    try:
        return bool(np.array_equal(decode(metadata, content), values))
    except ValueError:
        return False
