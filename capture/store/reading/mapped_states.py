"""Uncompressed states read by mapping their shards: no decoding, and no chunk read for one row of it.

Any Zarr library decodes whole chunks, so 64 random rows cost it 64 chunks. Here a row's place follows from
its shard's index, and rows are copied from the page cache straight into the result.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ....errors import StoreError
from .memory_map import Mapping

Key = tuple[slice | np.ndarray, ...]
"""Keys of all axes: for each a slice of step 1 with both ends, or int64 [n]; nothing negative."""

_REGION_SHARDS = 1024  # mapped together; at 512 MiB a shard half a TiB of addresses, of 128 that there are
_MAX_REGIONS = 48  # a process may have 65530 maps
_BLOCK_BYTES = 64 << 20  # rows copied at a time if only a part of each is wanted
_DTYPES = ("uint16", "float16", "float32", "float64")
_NO_CHUNK = 2**64 - 1
_MISSING, _UNKNOWN = -1, -2


def can_map(metadata: dict[str, Any]) -> bool:
    """Whether an array has shards of bare chunks, each of one depth, whose rows are whole in their chunk."""
    (codec, *more), shape = metadata["codecs"], metadata["shape"]
    if codec["name"] != "sharding_indexed" or more or metadata["data_type"] not in _DTYPES:
        return False
    sharding = codec["configuration"]
    (bare, *compressors) = sharding["codecs"]
    return (
        bare["name"] == "bytes"
        and bare.get("configuration", {}).get("endian", "little") == "little"
        and not compressors
        and sharding["index_location"] == "end"
        and [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
        and len(shape) == 3
        and sharding["chunk_shape"][1:] == [1, *shape[2:]]
    )


class MappedArray:
    """A stored array [rows, depths, hidden] in local files; may be read by many threads.

    Args:
        directory: the array's.
        metadata: its zarr.json, for which `can_map` holds.
    """

    def __init__(self, directory: Path, metadata: dict[str, Any]) -> None:
        self._directory = directory
        self.shape: tuple[int, ...] = tuple(metadata["shape"])
        self.dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
        self.fill = self.dtype.type(metadata["fill_value"])  # "NaN" for floats
        self.row_shape = self.shape[2:]
        self.chunk_rows: int = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
        self.shard_rows: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._region_rows = _REGION_SHARDS * self.shard_rows
        self._regions: OrderedDict[int, _Region] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_regions", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _regions=OrderedDict(), _lock=threading.Lock())

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    def shard_path(self, number: int) -> Path:
        return self._directory / f"c.{number}{'.0' * (len(self.shape) - 1)}"

    def read(self, key: Key) -> np.ndarray:
        """Reads values at the outer product of the axes' keys.

        Raises:
            StoreError: a file is missing or damaged.
        """
        rows, depths, *rest = key
        depth_numbers = np.arange(self.shape[1])[depths].tolist()
        wanted = [np.arange(n)[k] for k, n in zip(rest, self.row_shape, strict=True)]
        num_rows = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        values = np.empty((num_rows, len(depth_numbers), *map(len, wanted)), self.dtype)
        if all(isinstance(k, slice) for k in rest) and values.shape[2:] == self.row_shape:
            for place, depth in enumerate(depth_numbers):
                self.read_depth(rows, depth, values[:, place])
            return values
        # only a part of each row is wanted: some rows at a time, so that whole ones never pile up
        part = (slice(None), *wanted)
        step = max(1, _BLOCK_BYTES // self.row_bytes)
        block = np.empty((min(step, num_rows), *self.row_shape), self.dtype)
        for first in range(0, num_rows, step):
            stop = min(first + step, num_rows)
            is_slice = isinstance(rows, slice)
            here = slice(rows.start + first, rows.start + stop) if is_slice else rows[first:stop]
            for place, depth in enumerate(depth_numbers):
                self.read_depth(here, depth, block[: stop - first])
                values[first:stop, place] = block[: stop - first][part]
        return values

    def read_depth(self, rows: slice | np.ndarray, depth: int | np.ndarray, out: np.ndarray) -> None:
        """Reads rows of one depth, or single rows each of a depth of its own.

        Args:
            out: [rows, hidden], may be strided.
        """
        if isinstance(rows, slice):
            assert isinstance(depth, int)
            number, first = divmod(rows.start, self._region_rows)
            stop = first + rows.stop - rows.start
            if first < stop <= self._region_rows:
                self._region(number).copy(first, stop, depth, out)
                return
            for number, first, stop in self._spans(rows):
                begin = number * self._region_rows + first - rows.start
                self._region(number).copy(first, stop, depth, out[begin : begin + stop - first])
            return
        if not len(rows):
            return
        first, last = int(rows.min()) // self._region_rows, int(rows.max()) // self._region_rows
        if first == last and out.flags.c_contiguous:
            self._region(first).gather(rows - first * self._region_rows, depth, out)
            return
        numbers = rows // self._region_rows
        for number in np.unique(numbers).tolist():
            here = numbers == number
            part = np.empty((np.count_nonzero(here), *self.row_shape), self.dtype)
            depths = depth[here] if isinstance(depth, np.ndarray) else depth
            self._region(number).gather(rows[here] - number * self._region_rows, depths, part)
            out[here] = part

    def will_need(self, rows: slice, depth: int) -> None:
        """Makes the kernel read rows ahead of `read_depth`."""
        for number, first, stop in self._spans(rows):
            self._region(number).will_need(first, stop, depth)

    def _spans(self, rows: slice) -> list[tuple[int, int, int]]:
        """(region, first row in it, one past the last) of every region that rows lie in."""
        size, spans = self._region_rows, []
        for number in range(rows.start // size, -(-rows.stop // size)):
            first, stop = max(rows.start - number * size, 0), min(rows.stop - number * size, size)
            if first < stop:
                spans.append((number, first, stop))
        return spans

    def _region(self, number: int) -> "_Region":
        with self._lock:
            region = self._regions.get(number)
            if region is None:
                num_shards = min(_REGION_SHARDS, self.shape[0] // self.shard_rows - number * _REGION_SHARDS)
                region = self._regions[number] = _Region(self, number * _REGION_SHARDS, num_shards)
                if len(self._regions) > _MAX_REGIONS:
                    self._regions.popitem(last=False)  # goes when the last who reads it lets go
            else:
                self._regions.move_to_end(number)
            return region


class _Region:
    """Neighbouring shards, each mapped when it is first needed. Rows count from the first one's first."""

    def __init__(self, array: MappedArray, first_shard: int, num_shards: int) -> None:
        self._first_shard, self._shard_path, self._fill = first_shard, array.shard_path, array.fill
        self._chunk_rows, self._row_bytes = array.chunk_rows, array.row_bytes
        self._grid = (array.shard_rows // array.chunk_rows, array.shape[1])
        self._index_bytes = math.prod(self._grid) * 16
        num_bytes = math.prod(self._grid) * self._chunk_rows * self._row_bytes + self._index_bytes + 4
        self._mapping = Mapping(num_shards, num_bytes, self._row_bytes)
        self._rows = self._mapping.data.view(array.dtype).reshape(-1, *array.row_shape)
        # place of each chunk's first row among those
        self._source = np.full((num_shards * self._grid[0], self._grid[1]), _UNKNOWN, np.int64)
        self._lock = threading.Lock()

    def copy(self, first: int, stop: int, depth: int, out: np.ndarray) -> None:
        """Copies neighbouring rows into out."""
        at = first // self._chunk_rows
        if stop <= (at + 1) * self._chunk_rows and (source := int(self._source[at, depth])) >= 0:
            source += first - at * self._chunk_rows  # rows of one chunk take no more time than a plain map
            self._mapping.will_need_run(source * self._row_bytes, (stop - first) * self._row_bytes)
            out[:] = self._rows[source : source + stop - first]
            return
        for begin, end, source in self._runs(first, stop, depth):
            if source < 0:
                out[begin - first : end - first] = self._fill
            else:
                self._mapping.will_need_run(source * self._row_bytes, (end - begin) * self._row_bytes)
                out[begin - first : end - first] = self._rows[source : source + end - begin]

    def will_need(self, first: int, stop: int, depth: int) -> None:
        for begin, end, source in self._runs(first, stop, depth):
            if source >= 0:
                self._mapping.will_need_run(source * self._row_bytes, (end - begin) * self._row_bytes)

    def gather(self, rows: np.ndarray, depth: int | np.ndarray, out: np.ndarray) -> None:
        """Copies single rows, in any order, into a contiguous out."""
        chunks = rows // self._chunk_rows
        source = self._sources(chunks, depth)
        is_missing = source < 0
        source += rows - chunks * self._chunk_rows
        if not is_missing.any():
            self._mapping.will_need(source * self._row_bytes, self._row_bytes)
            np.take(self._rows, source, axis=0, out=out, mode="clip")  # "raise" takes a copy of out
            return
        out[is_missing] = self._fill
        self._mapping.will_need(source[~is_missing] * self._row_bytes, self._row_bytes)
        out[~is_missing] = self._rows[source[~is_missing]]

    def _runs(self, first: int, stop: int, depth: int) -> Iterator[tuple[int, int, int]]:
        """(first row, one past the last, source or -1) of rows that lie together."""
        size = self._chunk_rows
        chunks = np.arange(first // size, -(-stop // size))
        source = self._sources(chunks, depth)
        follows = np.where(source[:-1] < 0, source[1:] < 0, np.diff(source) == size)
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(chunks)]
        for at, next_at in pairwise(edges):
            start = int(chunks[at]) * size
            begin, end = max(first, start), min(stop, int(chunks[next_at - 1] + 1) * size)
            yield begin, end, int(source[at]) + (begin - start if source[at] >= 0 else 0)

    def _sources(self, chunks: np.ndarray, depth: int | np.ndarray) -> np.ndarray:
        source = self._source[chunks, depth]
        if (is_unknown := source == _UNKNOWN).any():
            for place in np.unique(chunks[is_unknown] // self._grid[0]).tolist():
                self._load(place)
            source = self._source[chunks, depth]
        return source

    def _load(self, place: int) -> None:
        """Maps a shard and reads its index."""
        path = self._shard_path(self._first_shard + place)
        here = slice(place * self._grid[0], (place + 1) * self._grid[0])
        with self._lock:
            if self._source[here.start, 0] != _UNKNOWN:
                return
            try:
                data = self._mapping.add(place, path)
            except FileNotFoundError:
                raise _damaged(path, "it is missing, though its unit is committed") from None
            end = len(data) - self._index_bytes - 4
            index = data[max(end, 0) : -4].tobytes()
            if end < 0 or google_crc32c.value(index).to_bytes(4, "little") != data[-4:].tobytes():
                raise _damaged(path, "its index is not what was written")
            offset, length = np.moveaxis(np.frombuffer(index, "<u8").reshape(*self._grid, 2), 2, 0)
            is_there = offset != _NO_CHUNK
            wrong = length != self._chunk_rows * self._row_bytes
            wrong |= (offset + length > end) | (offset % self._row_bytes > 0)
            if wrong[is_there].any():
                raise _damaged(path, "its index names chunks that it cannot hold")
            first_row = place * self._mapping.file_bytes // self._row_bytes
            offset = np.where(is_there, offset, 0).astype(np.int64)
            self._source[here] = np.where(is_there, first_row + offset // self._row_bytes, _MISSING)


def _damaged(path: Path, what: str) -> StoreError:
    store_path = path.parent.parent
    return StoreError(f"{path} cannot be read: {what}; run `looptap verify {store_path}`")
