"""One unit's rows of one array -> the bytes of its file, made by zarr-python."""

import json
from typing import Any

import numpy as np
import zarr
import zarr.storage
from zarr.core.buffer import Buffer, default_buffer_prototype


def unit_shape(array: dict[str, Any]) -> tuple[int, ...]:
    """Shape of what one unit owns: an array's chunk or shard, as the chunk grid has it."""
    return tuple(array["chunk_grid"]["configuration"]["chunk_shape"])


def encode(metadata: dict[str, Any], values: np.ndarray) -> np.ndarray:
    """Bytes of one chunk or shard of the array with this metadata, as read-only uint8.

    Missing rows are filled. Chunks inside a shard that hold nothing are left out; the whole never is, even if
    all of it is empty, so that every unit has the same files.
    """
    shape = unit_shape(metadata)
    if len(values) < shape[0]:
        fill_value = float(metadata["fill_value"])  # "NaN" for floats
        fill = np.full((shape[0] - len(values), *shape[1:]), fill_value, values.dtype)
        values = np.concatenate([values, fill])
    buffers: dict[str, Buffer] = {}
    make_buffer = default_buffer_prototype().buffer.from_bytes
    for write_empty in (False, True):
        buffers["zarr.json"] = make_buffer(json.dumps({**metadata, "shape": shape}).encode())
        array = zarr.open_array(zarr.storage.MemoryStore(buffers))
        array.with_config({"write_empty_chunks": write_empty})[...] = values
        for name, buffer in buffers.items():
            if name != "zarr.json":
                data = np.asarray(buffer.as_numpy_array()).view(np.uint8)
                data.flags.writeable = False  # google_crc32c takes nothing else without a copy
                return data
    raise AssertionError(f"zarr wrote nothing for {metadata}")
