"""Host buffers that a producer fills and the writing threads empty: as many as there are, and no more.

The producer waits when all are full. So a disk slower than the model slows the model down, instead of filling
the memory with what it left behind.
"""

import queue
from collections.abc import Callable

import numpy as np

from ..places.aligned import PAGE_BYTES, page_aligned


class Ring:
    """Buffers of one size, all of them free at first.

    Args:
        allocate: num_bytes -> uint8 memory that starts at a page; pinned where a GPU fills it.
    """

    def __init__(
        self, num_buffers: int, num_bytes: int, allocate: Callable[[int], np.ndarray] = page_aligned
    ) -> None:
        self.num_buffers, self.num_bytes = num_buffers, num_bytes
        stride = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        memory = allocate(num_buffers * stride)
        # the last one given back is the first one taken: it may still be in the processor's cache
        self._free: queue.LifoQueue[np.ndarray] = queue.LifoQueue()
        for start in reversed(range(0, num_buffers * stride, stride)):
            self._free.put(memory[start : start + num_bytes])

    def take(self) -> np.ndarray:
        """Waits for a free buffer and returns it, with whatever it held before, uint8 [num_bytes]."""
        return self._free.get()

    def give(self, buffer: np.ndarray) -> None:
        """Takes a buffer back, which is free again."""
        self._free.put(buffer)
