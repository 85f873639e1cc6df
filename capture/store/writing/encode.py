"""One unit's rows of one array -> the bytes of its files.

Made with the codecs that zarr-python's own are made of, by what the array's metadata says.
"""

import sys
from typing import Any

import google_crc32c
import numcodecs
import numpy as np

from ..places.place import Sink
from .shard import ShardWriter, fill_of

assert sys.byteorder == "little", "arrays are stored little-endian, and written as they lie in memory"


def file_shape(array: dict[str, Any]) -> tuple[int, ...]:
    """Returns the shape of what one file holds: an array's chunk or shard, as the chunk grid has it."""
    return tuple(array["chunk_grid"]["configuration"]["chunk_shape"])


def encode(metadata: dict[str, Any], values: np.ndarray) -> np.ndarray:
    """Returns the one chunk that a file of this array holds, as read-only uint8.

    Rows missing at the end are filled. Nothing is left out, even if all of it is fill, so that every unit has
    the same files.
    """
    shape = file_shape(metadata)
    if len(values) < shape[0]:
        fill = np.full((shape[0] - len(values), *shape[1:]), fill_of(metadata), values.dtype)
        values = np.concatenate([values, fill])
    bare, zstd = metadata["codecs"]
    if (bare["name"], zstd["name"]) != ("bytes", "zstd"):
        raise ValueError(f"chunks of this layout cannot be written: {metadata['codecs']}")
    data = numcodecs.Zstd(**zstd["configuration"]).encode(np.ascontiguousarray(values))
    return np.frombuffer(data, np.uint8)  # read-only


def write_array(metadata: dict[str, Any], rows: np.ndarray, sinks: list[Sink]) -> list[dict[str, Any]]:
    """Writes a unit's rows of one array, one sink a file.

    Args:
        rows: axis 0 up to the unit's rows; other axes and dtype are the array's.
    Returns:
        of each file {"bytes", "pieces"}, as `ShardWriter.close`.
    Raises:
        OSError: what a sink raised.
    """
    if metadata["codecs"][0]["name"] != "sharding_indexed":
        data = encode(metadata, rows)
        sinks[0].write_at(0, data)
        sinks[0].close(len(data))
        return [{"bytes": len(data), "pieces": [[0, len(data), f"{google_crc32c.value(data):08x}"]]}]
    writer = ShardWriter(metadata, sinks)
    try:
        for place, start in enumerate(range(0, len(rows), writer.buffer_rows)):
            part = rows[start : start + writer.buffer_rows]
            for depth in range(writer.num_depths):
                buffer = writer.take()
                target = buffer.view(rows.dtype).reshape(writer.buffer_shape)
                target[: len(part)] = part[:, depth : depth + 1] if rows.ndim > 1 else part
                writer.put(place, depth, buffer, len(part))
        return writer.close()
    except BaseException:
        writer.abort()
        raise
