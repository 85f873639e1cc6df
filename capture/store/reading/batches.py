"""States as batches for training: every captured token once an epoch, mixed, at about the speed of copying.

Single rows at random cost a page each where the disk is asked, and a whole chunk each where states are
compressed or far away. So whole chunks are read in random order, some hundred at a time, and only their rows
are mixed: each batch holds rows of all of them. The next so many are read meanwhile (`windows.py`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import NothingCapturedError, RequestError, UnfitError
from ..writing.commit import Store
from .coordinates import Coordinates
from .reader import open_array, to_float32
from .windows import Chunk, Gather, Window, iter_gathers

_SCANNED_ROWS = 1 << 22  # rows of a coordinate at a time


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of rows in batches: the same numbers always give the same batches."""

    batch_rows: int = 4096
    """Rows of a batch; the last one of an epoch may have fewer."""
    seed: int = 0
    epoch: int = 0
    """Number of the epoch; each has another order of the same rows."""
    buffer_chunks: int = 256
    """Chunks whose rows are mixed with each other. Compressed or far ones are held in memory, two times."""
    rank: int = 0
    """Number of the share of an epoch's chunks that is wanted, from 0."""
    num_ranks: int = 1
    """Number of shares; together they hold every row once."""
    start: int = 0
    """Number of batches to leave out at the start: those before an earlier run stopped."""

    def __post_init__(self) -> None:
        least = {"batch_rows": 1, "seed": 0, "epoch": 0, "buffer_chunks": 1, "num_ranks": 1, "start": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise RequestError(f"{name} is {getattr(self, name)}: give at least {number}")
        if not 0 <= self.rank < self.num_ranks:
            raise RequestError(f"rank is {self.rank}: {self.num_ranks} ranks are counted from 0")


def make_batches(
    store: str | Path, *, depths: Sequence[int] | None = None, decode: bool = True, **order: Any
) -> "Batches":
    """Returns batches of kept states of committed units, in random order.

    Args:
        store: a local directory or s3://bucket/prefix.
        depths: those to draw from, as `state_depth` has them; all that are kept by default. Rows of several
            depths come mixed.
        decode: give bfloat16 as float32; False gives its bits as uint16, which are half as many bytes and
            numbers only after `torch.from_numpy(rows).view(torch.bfloat16)`.
        order: batch_rows, seed, epoch, buffer_chunks, rank, num_ranks, start, as `Order` has them.
    Returns:
        an iterable of arrays [rows, hidden], each the caller's own; `len` is their number. Workers of a torch
        DataLoader (`batch_size=None`) take a rank each.
    Raises:
        UnfitError, UnfitError, NothingCapturedError: no such depth is kept, no states are, or none is
            committed.
        StoreError, StoreMissingError: as `looptap.open`; while reading: a file is missing or damaged.
    """
    opened = Store.open(store)
    if "state" not in opened.arrays:
        raise UnfitError(f"{store} keeps no states: capture again with --quantities all,state --states core")
    kept = Coordinates(opened).rows("state_depth").tolist()
    wanted = kept if depths is None else list(depths)
    if absent := [depth for depth in wanted if depth not in kept]:
        raise UnfitError(
            f"no state of depth {', '.join(map(str, absent))} is kept in {store}: "
            f"choose from {', '.join(map(str, kept))}"
        )
    batches = Batches(opened, [kept.index(depth) for depth in dict.fromkeys(wanted)], decode, Order(**order))
    if not batches.has_rows:
        raise NothingCapturedError(f"{store} holds no state of a committed unit yet: go on with its capture")
    return batches


class Batches:
    """An epoch's batches; iterating again gives the same ones."""

    def __init__(self, store: Store, places: list[int], decode: bool, order: Order) -> None:
        self.order, self._decode = order, decode
        metadata = store.metadata["state"]
        self._array = open_array(store, "state")
        self._chunk_rows: int = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
        self._hidden = self._array.shape[2]
        self._is_bfloat16 = metadata["attributes"].get("bits_of") == "bfloat16"
        self._counts, self._picks = _rows_of_chunks(store, self._chunk_rows)
        filled = np.flatnonzero(self._counts)
        self.has_rows = len(filled) > 0  # whatever the rank
        # a random order of all pairs of a chunk and a depth
        pairs = np.random.default_rng([order.seed, order.epoch]).permutation(len(filled) * len(places))
        pairs = pairs[order.rank :: order.num_ranks]
        self._chunks, self._places = filled[pairs // len(places)], np.array(places)[pairs % len(places)]
        self.num_rows = int(self._counts[self._chunks].sum())

    def __len__(self) -> int:
        return max(0, -(-self.num_rows // self.order.batch_rows) - self.order.start)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields batches from `start` on."""
        size = self.order.batch_rows
        skip = self.order.start * size
        batch, filled = None, 0
        for gather, order in self._windows(skip):
            taken = 0
            while taken < len(order):
                if batch is None:
                    left = min(size, self.num_rows - skip)
                    batch, filled = np.empty((left, self._hidden), self._array.dtype), 0
                num = min(len(batch) - filled, len(order) - taken)
                gather(order[taken : taken + num], batch[filled : filled + num])
                filled, taken = filled + num, taken + num
                if filled == len(batch):
                    skip += filled
                    yield to_float32(batch) if self._decode and self._is_bfloat16 else batch
                    batch = None

    def _windows(self, skip: int) -> Iterator[tuple[Gather, np.ndarray]]:
        """Yields a function that gathers rows of a window, and the order to take them in, from row `skip`."""
        size, num_chunks = self.order.buffer_chunks, len(self._chunks)
        ends = np.cumsum(self._counts[self._chunks])
        lasts = np.minimum(np.arange(size, num_chunks + size, size), num_chunks) - 1
        first = int(np.searchsorted(ends[lasts], skip, side="right"))
        wanted = range(first, len(lasts))
        gathers = iter_gathers(self._array, (self._window(number) for number in wanted))
        with closing(gathers):
            for number, gather in zip(wanted, gathers, strict=True):
                before = int(ends[number * size - 1]) if number else 0
                seed = [self.order.seed, self.order.epoch, self.order.rank, number]
                order = np.random.default_rng(seed).permutation(int(ends[lasts[number]]) - before)
                yield gather, order[max(0, skip - before) :]

    def _window(self, number: int) -> Window:
        here = slice(number * self.order.buffer_chunks, (number + 1) * self.order.buffer_chunks)
        chunks = zip(self._chunks[here].tolist(), self._places[here].tolist(), strict=True)
        return [Chunk(self._rows(chunk), depth) for chunk, depth in chunks]

    def _rows(self, chunk: int) -> np.ndarray:
        """Returns a chunk's rows that hold a token's state."""
        start = chunk * self._chunk_rows
        if chunk in self._picks:
            return start + self._picks[chunk]
        return np.arange(start, start + int(self._counts[chunk]))


def _rows_of_chunks(store: Store, chunk_rows: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Returns the number of rows with a committed state in each chunk, and which, if not the first."""
    unit_rows = store.unit_rows("state")
    name = (
        "state_token" if store.metadata["state"]["dimension_names"][0] == "token_state" else "token_sequence"
    )
    owner = Coordinates(store)
    is_done_U = np.zeros(store.num_units, bool)
    is_done_U[store.done()] = True
    num_rows = store.metadata["state"]["shape"][0]
    counts = np.zeros(num_rows // chunk_rows, np.int64)
    picks: dict[int, np.ndarray] = {}
    step = math.ceil(_SCANNED_ROWS / unit_rows) * unit_rows
    for first in range(0, num_rows, step):
        stop = min(first + step, num_rows)
        is_filled = owner.rows(name, first, stop) >= 0
        is_filled &= np.repeat(is_done_U[first // unit_rows : stop // unit_rows], unit_rows)
        is_filled = is_filled.reshape(-1, chunk_rows)
        here = slice(first // chunk_rows, stop // chunk_rows)
        counts[here] = is_filled.sum(axis=1)
        is_first = is_filled == (np.arange(chunk_rows) < counts[here, None])
        for chunk in np.flatnonzero(~is_first.all(axis=1)).tolist():
            picks[here.start + chunk] = np.flatnonzero(is_filled[chunk])
    return counts, picks
