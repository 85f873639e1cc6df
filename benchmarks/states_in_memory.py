"""Kept states in memory, for benchmarks and tests: a capture streams them to disk. Loads torch alone."""

from torch import Tensor


class StatesInMemory:
    """Fills [depth_state, kept tokens, D], whose rows come in order."""

    def __init__(self, state_LKD: Tensor) -> None:
        self.state_LKD = state_LKD
        self._num_rows = [0] * len(state_LKD)

    def add(self, index: int, kept_KD: Tensor) -> None:
        first = self._num_rows[index]
        self._num_rows[index] += len(kept_KD)
        self.state_LKD[index, first : self._num_rows[index]] = kept_KD
