"""A worker whose measuring can be timed apart from its store."""

import torch
from torch import Tensor

from ..capture.worker import Worker
from .states_in_memory import StatesInMemory


class MeasuringWorker(Worker):
    """A worker that can also run a unit without writing it."""

    def measure(self, unit: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Runs one unit; returns what was measured, and the states [depth, token, D] if they are kept."""
        sequences, states = self._sequences(unit), None
        if self._state_depths:
            num_kept = len(self._state_slots(unit, sequences))
            shape = (len(self._state_depths), num_kept, self.model.description.width)
            states = StatesInMemory(torch.empty(shape, dtype=self.model.dtype, device=self.model.device))
        values = self._measure(unit, sequences, states)
        return values, None if states is None else states.state_LKD
