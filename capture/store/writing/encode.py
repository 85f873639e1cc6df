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


def decode(metadata: dict[str, Any], content: bytes) -> np.ndarray:
    """Returns the values of the one chunk that a file of this array holds, the inverse of `encode`.

    Raises:
        ValueError: it is no such chunk.
    """
    values = np.empty(file_shape(metadata), metadata["data_type"])
    try:
        if (num_bytes := _frame_bytes(content)) != values.nbytes:
            raise ValueError(f"it holds {num_bytes} bytes")
        numcodecs.Zstd().decode(content, out=values)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"it is no chunk of {list(values.shape)} {values.dtype}: {error}") from None
    return values


def _frame_bytes(frame: bytes) -> int | None:
    """Returns the size of the content that a zstd frame says it has (RFC 8878, 3.1.1.1); None if it says
    none.
    """
    if len(frame) < 6:
        return None
    descriptor = frame[4]
    is_single, size_flag, dictionary_flag = descriptor >> 5 & 1, descriptor >> 6, descriptor & 3
    width = (1 if is_single else 0, 2, 4, 8)[size_flag]
    start = 5 + (not is_single) + (0, 1, 2, 4)[dictionary_flag]
    if not width or len(frame) < start + width:
        return None
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


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
