"""The kept states of one sequence, read from the store when they are asked for, a few tokens at a time.

All depths of a few hundred tokens can be gigabytes, so states are not loaded with the rest of a unit.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ..capture.store.reading.reader import to_float32

_BLOCK_BYTES = 2**25  # float32 of one block
_Places = np.ndarray | slice


class StateWindow:
    """Rows of `state` [token, depth, hidden] one after another, read ahead as many as make a block.

    Args:
        state: the store's array, lazy.
        stop: past the last row that is wanted.
    """

    def __init__(self, state: xr.DataArray, stop: int) -> None:
        self.state, self._stop = state, stop
        self._first, self._read_TKD = 0, np.empty((0, *state.shape[1:]), np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads these rows, float32 [token, depth, hidden]; at most as many as a block."""
        if not self._first <= start <= stop <= self._first + len(self._read_TKD):
            _, K, D = self.state.shape
            ahead = max(stop, min(self._stop, start + _BLOCK_BYTES // (4 * K * D)))
            self._read_TKD = decoded(self.state.isel({self.state.dims[0]: slice(start, ahead)}))
            self._first = start
        return self._read_TKD[start - self._first : stop - self._first]


class StateRows:
    """Rows of `state` that belong to one sequence.

    Args:
        window: window over the store's array.
        rows: the sequence's rows of it; empty where none of its tokens is kept.
    """

    def __init__(self, window: StateWindow, rows: slice) -> None:
        self._window, self._rows = window, rows
        self.shape = (rows.stop - rows.start, *window.state.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, places: _Places = slice(None), every: int = 1, first: int = 0) -> Iterator[np.ndarray]:
        """Yields states of a few tokens after another, float32 [token, place, hidden].

        A sequence that is no more than a block is read once, whoever asks for it, with those after it.

        Args:
            places: on the axis of kept depths.
            every, first: reads only the token at `first` and each `every` after it.
        """
        T, K, D = self.shape
        token_bytes = 4 * D * (K if isinstance(places, slice) else len(places))
        if 4 * T * K * D <= _BLOCK_BYTES:
            if first < T:
                yield self._window.rows(self._rows.start, self._rows.stop)[first::every, places]
            return
        chosen = np.arange(self._rows.start + first, self._rows.stop, every)
        few = max(1, _BLOCK_BYTES // token_bytes)
        for start in range(0, len(chosen), few):
            some = chosen[start : start + few]
            # neighbours are named by a slice, which is copied as one piece
            token = slice(int(some[0]), int(some[-1]) + 1) if every == 1 else some
            state = self._window.state
            yield decoded(state.isel({state.dims[0]: token, "depth_state": places}))


def decoded(values: xr.DataArray) -> np.ndarray:
    """Returns values as float32, also of stored bits of bfloat16."""
    array = values.values
    is_bits = values.attrs.get("bits_of") == "bfloat16" and array.dtype == np.uint16
    return to_float32(array) if is_bits else array
