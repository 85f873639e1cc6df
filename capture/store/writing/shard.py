"""Zarr v3 shards written piece by piece as they come, without a second copy of a shard in memory.

A library that writes a shard wants all of it at once, and turns it over to chunk order in a second buffer. A
model leaves its residuals depth by depth, which is chunk order already. So here a few chunks of one depth at
a time go straight to their place in the file, from a ring of buffers, and the index follows at the end.

In an uncompressed shard chunks of one depth lie together: the file is a C-order [depth, row, hidden] tensor
followed by an index, and can be mapped. Chunks past the last row are missing: holes in the file. Compressed
chunks stand in the order in which they were ready.
"""

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numcodecs
import numpy as np

from ..places.place import Sink
from .ring import PAGE_BYTES, Ring

_MISSING = 2**64 - 1
# 1 MiB at a time cost a third more processor time than 4 MiB on a virtual disk, and 8 MiB hardly less
_WRITE_BYTES = 4 << 20
_ALIGNED_BYTES = 256 << 10  # compressed pieces end at a page where that costs under two parts in a hundred


class ShardWriter:
    """Writes one unit's shards of one array.

    `take` a buffer, fill it, `put` it; then `close`, or `abort`. These belong to one thread; writing goes on
    in others.

    Args:
        metadata: the array's, as zarr-python made it from an ArraySpec with codec none or lossless.
        sinks: one for each of the unit's shards, in order.
        ring: ring of buffers of `buffer_bytes`; without it the writer makes a small one.
        num_threads: number of writing threads; by default 2 to 4, as there are processors.
    Raises:
        ValueError: an array of another layout.
    """

    def __init__(
        self,
        metadata: dict[str, Any],
        sinks: Sequence[Sink],
        ring: Ring | None = None,
        num_threads: int | None = None,
    ) -> None:
        num_threads = num_threads or max(2, min(4, os.cpu_count() or 1))
        self._chunk_shape, self._codec = _read_codecs(metadata)
        self._dtype = np.dtype(metadata["data_type"])
        self._fill = fill_of(metadata)
        self._sinks = list(sinks)
        shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        self.num_depths = shard[1] if len(shard) > 1 else 1
        self._chunk_bytes = math.prod(self._chunk_shape) * self._dtype.itemsize
        self._num_blocks = shard[0] // self._chunk_shape[0]  # chunks along the rows of one shard
        self.buffer_rows = buffer_rows(self._chunk_shape, shard, self._dtype.itemsize)
        self.buffer_shape = (self.buffer_rows, *self._chunk_shape[1:])
        self._buffer_blocks = self.buffer_rows // self._chunk_shape[0]
        num_bytes = self._buffer_blocks * self._chunk_bytes
        self.ring = ring or Ring(num_threads + 2, num_bytes)
        if self.ring.num_bytes != num_bytes:
            raise ValueError(
                f"the ring's buffers hold {self.ring.num_bytes} bytes, and {num_bytes} are written"
            )
        self._shards = [_Shard(self._num_blocks, self.num_depths) for _ in sinks]
        self._pool = ThreadPoolExecutor(num_threads, "shard-writer")
        self._error: BaseException | None = None

    def take(self) -> np.ndarray:
        """Waits for a buffer for `buffer_rows` rows of one depth, uint8, and returns it; its content is
        unknown.

        Raises:
            OSError: what was put earlier could not be written.
        """
        self._raise_error()
        buffer = self.ring.take()
        if self._error is not None:
            self.ring.give(buffer)
            self._raise_error()
        return buffer

    def put(
        self,
        place: int,
        depth: int,
        buffer: np.ndarray,
        num_rows: int,
        ready: Callable[[], Any] = lambda: None,
    ) -> None:
        """Hands rows over; the buffer is the ring's again, and not to be touched.

        Args:
            place: number of these `buffer_rows` among those of the unit's rows, from 0.
            depth: place on axis 1.
            num_rows: rows that were filled, from the first; fewer only where the unit ends.
            ready: called before the buffer is read, by the writing thread; waits for a copy to end.
        """
        index, block = divmod(place * self._buffer_blocks, self._num_blocks)
        num_blocks = -(-num_rows // self._chunk_shape[0])
        taken = self._shards[index].taken[block : block + num_blocks, depth]
        assert not taken.any(), f"row block {block} of shard {index} at depth {depth} was put twice"
        taken[:] = True
        self._pool.submit(self._write, index, block, depth, buffer, num_rows, ready)

    def close(self) -> list[dict[str, Any]]:
        """Waits until all is written, and closes the sinks.

        Returns:
            of each shard, in order: `bytes`, its length; `pieces`, [offset, length, crc32c in hex] of all but
            holes, in file order.
        Raises:
            as `take`; then the writer has aborted.
        """
        try:
            return self._close()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Drops what was written. Buffers that were taken and not put stay with who took them."""
        self._error = self._error or RuntimeError("the writer was told to abort")
        self._pool.shutdown()
        for sink in self._sinks:
            sink.discard()

    def _close(self) -> list[dict[str, Any]]:
        self._pool.shutdown()
        self._raise_error()
        taken = np.concatenate([shard.taken for shard in self._shards])
        blocks = taken.any(axis=1)
        assert (taken.all(axis=1) == blocks).all(), "some depths have rows that others lack"
        assert not (np.diff(blocks.astype(np.int8)) > 0).any(), "rows are missing before others"
        return [self._close_shard(shard, sink) for shard, sink in zip(self._shards, self._sinks, strict=True)]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(
        self,
        index: int,
        block: int,
        depth: int,
        buffer: np.ndarray,
        num_rows: int,
        ready: Callable[[], Any],
    ) -> None:
        try:
            ready()  # even after an error: the copy must end before the buffer is free
            if self._error is None:
                num_blocks = -(-num_rows // self._chunk_shape[0])
                rows = buffer.view(self._dtype).reshape(self.buffer_shape)
                rows[num_rows : num_blocks * self._chunk_shape[0]] = self._fill
                write = self._write_bare if self._codec is None else self._write_encoded
                write(index, block, depth, buffer, num_blocks)
        except BaseException as error:
            self._error = self._error or error
        finally:
            self.ring.give(buffer)

    def _write_bare(self, index: int, block: int, depth: int, buffer: np.ndarray, num_blocks: int) -> None:
        offset = (depth * self._num_blocks + block) * self._chunk_bytes
        data = buffer[: num_blocks * self._chunk_bytes]
        self._shards[index].add(block, depth, offset, [self._chunk_bytes] * num_blocks, data)
        self._sinks[index].write_at(offset, data)

    def _write_encoded(self, index: int, block: int, depth: int, buffer: np.ndarray, num_blocks: int) -> None:
        shard, sink = self._shards[index], self._sinks[index]
        chunks = buffer.view(self._dtype).reshape(self._buffer_blocks, *self._chunk_shape)
        encoded = [self._codec.encode(chunk) for chunk in chunks[:num_blocks]]
        lengths = list(map(len, encoded))
        data, num_bytes = b"".join(encoded), sum(lengths)
        if len(buffer) < _ALIGNED_BYTES or len(buffer) % PAGE_BYTES or num_bytes > len(buffer):
            offset = shard.reserve(num_bytes)
            shard.add(block, depth, offset, lengths, data)
            sink.write_at(offset, data)
            return
        # in whole pages, from the buffer whose content is no longer needed: O_DIRECT takes that
        page_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        buffer[:num_bytes] = np.frombuffer(data, np.uint8)
        buffer[num_bytes:page_bytes] = 0
        offset = shard.reserve(page_bytes)
        shard.add(block, depth, offset, lengths, data)
        sink.write_at(offset, buffer[:page_bytes])

    def _close_shard(self, shard: "_Shard", sink: Sink) -> dict[str, Any]:
        index = shard.index.tobytes()
        index += google_crc32c.value(index).to_bytes(4, "little")
        offset = shard.taken.size * self._chunk_bytes if self._codec is None else shard.end
        sink.write_at(offset, index)
        sink.close(offset + len(index))
        pieces = [*sorted(shard.pieces), [offset, len(index), _crc32c(index)]]
        return {"bytes": offset + len(index), "pieces": pieces}


class _Shard:
    """Record of one shard's content so far."""

    def __init__(self, num_blocks: int, num_depths: int) -> None:
        self.index = np.full((num_blocks, num_depths, 2), _MISSING, "<u8")  # offset, length
        self.taken = np.zeros((num_blocks, num_depths), bool)
        self.pieces: list[list[Any]] = []
        self.end = 0
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int) -> int:
        """Reserves so many bytes; returns their offset."""
        with self._lock:
            self.end += num_bytes
            return self.end - num_bytes

    def add(
        self, block: int, depth: int, offset: int, lengths: Sequence[int], data: bytes | np.ndarray
    ) -> None:
        """Notes the places of neighbouring chunks, and their checksum."""
        ends = offset + np.cumsum(lengths)
        self.index[block : block + len(lengths), depth, 0] = ends - lengths
        self.index[block : block + len(lengths), depth, 1] = lengths
        self.pieces.append([offset, len(data), _crc32c(data)])


def buffer_rows(chunk_shape: Sequence[int], shard_shape: Sequence[int], itemsize: int) -> int:
    """Returns the rows of a depth that are written at once: chunks of about 4 MiB that divide a shard."""
    chunk_bytes, num_blocks = math.prod(chunk_shape) * itemsize, shard_shape[0] // chunk_shape[0]
    divisors = (n for n in range(num_blocks, 1, -1) if num_blocks % n == 0)
    return chunk_shape[0] * next((n for n in divisors if n * chunk_bytes <= _WRITE_BYTES), 1)


def buffer_bytes(metadata: dict[str, Any]) -> int:
    """Returns the bytes that a ring's buffers must hold to write this array."""
    (chunk, _), dtype = _read_codecs(metadata), np.dtype(metadata["data_type"])
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return buffer_rows(chunk, shard, dtype.itemsize) * math.prod(chunk[1:]) * dtype.itemsize


def fill_of(metadata: dict[str, Any]) -> np.generic:
    """Returns what an array's unwritten elements read as."""
    return np.dtype(metadata["data_type"]).type(metadata["fill_value"])  # "NaN" for floats


def _read_codecs(metadata: dict[str, Any]) -> tuple[tuple[int, ...], Any]:
    """Returns the shape of a chunk, and its compressor or None.

    Raises:
        ValueError: not a layout that this writer writes.
    """
    (sharding,) = metadata["codecs"]
    configuration = sharding["configuration"]
    bare, *more = configuration["codecs"]
    shape = tuple(configuration["chunk_shape"])
    names = [codec["name"] for codec in configuration["index_codecs"]]
    if (
        sharding["name"] != "sharding_indexed"
        or bare["name"] != "bytes"
        or names != ["bytes", "crc32c"]
        or configuration["index_location"] != "end"
        or shape[1:2] not in ((), (1,))
        or shape[2:] != tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"][2:])
        or [codec["name"] for codec in more] not in ([], ["blosc"])
    ):
        raise ValueError(f"shards of this layout cannot be written: {metadata['codecs']}")
    if not more:
        return shape, None
    blosc = more[0]["configuration"]
    shuffle = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[blosc["shuffle"]]
    return shape, numcodecs.Blosc(blosc["cname"], blosc["clevel"], shuffle, blosc["blocksize"])


def _crc32c(data: bytes | np.ndarray) -> str:
    if isinstance(data, np.ndarray):
        data = data.view()
        data.flags.writeable = False  # google_crc32c takes nothing else without a copy
    return f"{google_crc32c.value(data):08x}"
