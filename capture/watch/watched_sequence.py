"""Record of each sequence so far: arrays that grow while a cache is decoded."""

from collections.abc import Mapping

import numpy as np


class WatchedSequence:
    """One row of a batch, and the tokens that later calls added to it."""

    def __init__(self) -> None:
        self.length = 0
        self.positions = np.empty(0, np.int64)
        """Positions of the tokens whose states are kept."""
        self.states: list[np.ndarray] = []
        """States of these tokens, [kept, depth_state, hidden] in parts."""
        self._arrays: dict[str, np.ndarray] = {}  # axis 0 has room to grow

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns one array, of `length` tokens."""
        return self._arrays[name][: self.length]

    def extend(self, count: int, rows: Mapping[str, np.ndarray], received: np.ndarray | None) -> None:
        """Adds tokens.

        Args:
            rows: values of the new tokens by name, [count, ...].
            received: attention that all tokens, earlier ones first, receive from the new ones.
        """
        new = self.length + count
        for name, values in rows.items():
            self._room(name, new, values)[self.length : new] = values
        if received is not None:
            self._room("attention_received", new, received)[:new] += received
        self.length = new

    def keep_states(self, positions: np.ndarray, rows: np.ndarray, *, only: bool) -> None:
        """Adds states; `only`: instead of those kept so far."""
        if only:
            self.positions, self.states = positions[:0], []
        self.positions = np.concatenate([self.positions, positions])
        self.states.append(rows)

    def _room(self, name: str, rows: int, like: np.ndarray) -> np.ndarray:
        array = self._arrays.get(name)
        if array is None or len(array) < rows:
            # twice what there was: tokens that come one at a time cost no more than all at once
            size = rows if array is None else max(rows, 2 * len(array))
            grown = np.zeros((size, *like.shape[1:]), like.dtype)
            if array is not None:
                grown[: self.length] = array[: self.length]
            self._arrays[name] = array = grown
        return array
