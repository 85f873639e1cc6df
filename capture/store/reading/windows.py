"""The rows of a few hundred chunks at a time, for `batches.py` to take in any order.

Mapped, they lie in the page cache: each is copied once, from there into a batch, by a few threads, and the
kernel is told ahead of the next window's chunks. What a library must decode or fetch is read whole, in other
threads, while rows of the window before are taken.
"""

import math
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

import numpy as np

from .decoded_arrays import LibraryArray
from .mapped_states import MappedArray

_LIBRARY_READERS = 4  # chunks that are decoded or fetched at once
_MOST_COPIERS = 4  # threads; one alone does not fill the memory's bandwidth
_COPIER_BYTES = 1 << 20  # least part of a batch for which another thread is worth waking

Gather = Callable[[np.ndarray, np.ndarray], None]
"""Rows at these places of a window, into an array [rows, hidden]."""


@dataclass(frozen=True)
class Chunk:
    """A chunk's rows that are wanted, in ascending order, and their place on the axis of depths."""

    rows: np.ndarray
    depth: int

    @property
    def span(self) -> slice:
        return slice(int(self.rows[0]), int(self.rows[-1]) + 1)


Window = list[Chunk]


def iter_gathers(
    array: MappedArray | LibraryArray, windows: Iterator[Window]
) -> Generator[Gather, None, None]:
    """Yields a function for each window that gathers its rows; it is good until the next one is asked for."""
    return _mapped(array, windows) if isinstance(array, MappedArray) else _decoded(array, windows)


def _mapped(array: MappedArray, windows: Iterator[Window]) -> Generator[Gather, None, None]:
    window = next(windows, None)
    for chunk in window or ():
        array.will_need(chunk.span, chunk.depth)
    with ThreadPoolExecutor(_num_copiers(), "looptap-batches") as copiers:
        while window is not None:
            upcoming = next(windows, None)
            yield _gather_mapped(array, window, upcoming or [], copiers)
            window = upcoming


def _num_copiers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST_COPIERS)


def _gather_mapped(
    array: MappedArray, window: Window, upcoming: Window, copiers: ThreadPoolExecutor
) -> Gather:
    rows = np.concatenate([chunk.rows for chunk in window])
    depths = np.repeat([chunk.depth for chunk in window], [len(chunk.rows) for chunk in window])
    hints = iter(upcoming)

    def copy(places: np.ndarray, out: np.ndarray) -> None:
        array.read_depth(rows[places], depths[places], out)

    def gather(places: np.ndarray, out: np.ndarray) -> None:
        # a few with each batch: all at once would hold up the first
        for chunk in islice(hints, math.ceil(len(upcoming) * len(places) / len(rows))):
            array.will_need(chunk.span, chunk.depth)
        num_parts = max(1, min(_num_copiers(), out.nbytes // _COPIER_BYTES))
        first, *others = zip(np.array_split(places, num_parts), np.array_split(out, num_parts), strict=True)
        pending = [copiers.submit(copy, *part) for part in others]
        copy(*first)
        for part in pending:
            part.result()

    return gather


def _decoded(array: LibraryArray, windows: Iterator[Window]) -> Generator[Gather, None, None]:
    with ThreadPoolExecutor(1, "looptap-batches") as reading:
        pending = _submit(reading, array, windows)
        try:
            while pending is not None:
                rows = pending.result()
                pending = _submit(reading, array, windows)
                yield partial(_gather_decoded, rows)
        finally:
            if pending is not None:
                pending.cancel()


def _submit(
    reading: ThreadPoolExecutor, array: LibraryArray, windows: Iterator[Window]
) -> Future[np.ndarray] | None:
    window = next(windows, None)
    return None if window is None else reading.submit(_decode, array, window)


def _decode(array: LibraryArray, window: Window) -> np.ndarray:
    """All rows of a window, one chunk after the other."""
    counts = [len(chunk.rows) for chunk in window]
    rows = np.empty((sum(counts), *array.shape[2:]), array.dtype)

    def decode(chunk: Chunk, end: int) -> None:
        key = (chunk.span, slice(chunk.depth, chunk.depth + 1), slice(0, array.shape[2]))
        rows[end - len(chunk.rows) : end] = array.read(key)[chunk.rows - chunk.span.start, 0]

    with ThreadPoolExecutor(_LIBRARY_READERS) as pool:
        list(pool.map(decode, window, accumulate(counts)))
    return rows


def _gather_decoded(rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    np.take(rows, places, axis=0, out=out, mode="clip")  # "raise" takes a copy of out
