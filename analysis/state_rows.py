"""The kept states of one sequence, read from the store when they are asked for, a few tokens at a time.

All depths of a few hundred tokens can be gigabytes, so states are not loaded with the rest of a unit.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from ..capture.store.reader import to_float32

_BLOCK_BYTES = 2**25  # float32 of one block
_Places = np.ndarray | slice


class StateRows:
    """Rows of `state` [token, depth, hidden] that belong to one sequence.

    Args:
        state: the store's array, lazy.
        rows: the sequence's rows of it; empty where none of its tokens is kept.
    """

    def __init__(self, state: xr.DataArray, rows: slice) -> None:
        self._state, self._rows = state, rows
        self.shape = (rows.stop - rows.start, *state.shape[1:])
        self._whole: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, places: _Places = slice(None), every: int = 1, first: int = 0) -> Iterator[np.ndarray]:
        """States of a few tokens after another, float32 [token, place, hidden].

        A sequence that is one block is read once, whoever asks for it.

        Args:
            places: on the axis of kept depths.
            every, first: of the tokens only the one at `first` and each `every` after it.
        """
        T, K, D = self.shape
        token_bytes = 4 * D * (K if isinstance(places, slice) else len(places))
        if 4 * T * K * D <= _BLOCK_BYTES:
            if first < T:
                yield self._all()[first::every, places]
            return
        chosen = np.arange(self._rows.start + first, self._rows.stop, every)
        few = max(1, _BLOCK_BYTES // token_bytes)
        for start in range(0, len(chosen), few):
            some = chosen[start : start + few]
            # neighbours are named by a slice, which is copied as one piece
            token = slice(int(some[0]), int(some[-1]) + 1) if every == 1 else some
            yield decoded(self._state.isel({self._state.dims[0]: token, "depth_state": places}))

    def _all(self) -> np.ndarray:
        if self._whole is None:
            self._whole = decoded(self._state.isel({self._state.dims[0]: self._rows}))
        return self._whole


def decoded(values: xr.DataArray) -> np.ndarray:
    """Values as float32, also where the bits of bfloat16 are stored."""
    array = values.values
    is_bits = values.attrs.get("bits_of") == "bfloat16" and array.dtype == np.uint16
    return to_float32(array) if is_bits else array
