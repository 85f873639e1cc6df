"""Writes kept states to disk while the model runs.

A unit's states may be far more than the host's memory. They leave the model depth by depth and batch by
batch; each depth fills a buffer of its own, which is written when it is full while the model goes on. On a
GPU a stream of its own copies them to pinned memory.
"""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..store.places.aligned import page_aligned
from ..store.writing.ring import Ring
from ..store.writing.shard import ShardWriter, buffer_bytes

_PORTABLE = 1  # cudaHostRegisterPortable
_SPARE_BUFFERS = 6  # being written or about to be, beside one that each depth fills


def num_buffers(num_depths: int) -> int:
    """Number of the ring's buffers with which the model waits only if the disk is slower than it."""
    return num_depths + _SPARE_BUFFERS


def make_ring(metadata: dict[str, Any], device: torch.device) -> Ring:
    """Makes the ring of buffers for an array of states, pinned if a GPU fills them."""
    allocate = _pinned if device.type == "cuda" else page_aligned
    return Ring(num_buffers(metadata["shape"][1]), buffer_bytes(metadata), allocate)


class StateStream:
    """Hands one unit's states to a writer, a buffer at a time.

    Args:
        writer: writer of the array, with a ring that has more buffers than there are depths.
        dtype: dtype of the states; the array holds them or, of bfloat16, their bits.
    """

    def __init__(self, writer: ShardWriter, dtype: torch.dtype, device: torch.device) -> None:
        assert writer.ring.num_buffers > writer.num_depths, "the ring would run dry with no buffer full"
        self._writer, self._dtype = writer, dtype
        self._buffer_rows, _, self._width = writer.buffer_shape
        self._num_rows = [0] * writer.num_depths
        self._open: dict[int, np.ndarray] = {}  # by depth: the buffer that it fills
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._num_non_finite = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, index: int, kept_KD: Tensor) -> None:
        """Takes the next rows of a depth.

        Raises:
            OSError: earlier ones could not be written.
        """
        self._num_non_finite += (~kept_KD.isfinite()).sum()
        if self._copying is not None:
            self._copying.wait_stream(torch.cuda.current_stream(kept_KD.device))
            kept_KD.record_stream(self._copying)
        while len(kept_KD):
            filled = self._num_rows[index] % self._buffer_rows
            if index not in self._open:
                self._open[index] = self._writer.take()
            buffer_RD = torch.from_numpy(self._open[index]).view(self._dtype).view(-1, self._width)
            part_RD = kept_KD[: self._buffer_rows - filled]
            with torch.cuda.stream(self._copying):  # without a GPU this is nothing
                buffer_RD[filled : filled + len(part_RD)].copy_(part_RD, non_blocking=True)
            self._num_rows[index] += len(part_RD)
            if filled + len(part_RD) == self._buffer_rows:
                self._put(index)
            kept_KD = kept_KD[len(part_RD) :]

    def finish(self) -> int:
        """Hands over what is left; returns how many values are infinite or undefined."""
        for index in list(self._open):
            self._put(index)
        return int(self._num_non_finite)

    def release(self) -> None:
        """Gives back buffers that will not be written; for a unit that failed."""
        if self._copying is not None:
            self._copying.synchronize()
        while self._open:
            self._writer.ring.give(self._open.popitem()[1])

    def _put(self, index: int) -> None:
        place, last = divmod(self._num_rows[index] - 1, self._buffer_rows)
        buffer = self._open.pop(index)
        if self._copying is None:
            self._writer.put(place, index, buffer, last + 1)
        else:
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._copying)
            self._writer.put(place, index, buffer, last + 1, copied.synchronize)


def _pinned(num_bytes: int) -> np.ndarray:
    """Allocates pages that a GPU copies to while the processor goes on.

    Registered rather than taken from torch, whose pinned memory comes in powers of two.

    Raises:
        RuntimeError: CUDA does not pin so much.
    """
    memory, runtime = page_aligned(num_bytes), torch.cuda.cudart()
    assert runtime is not None
    if code := int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)):
        raise RuntimeError(
            f"CUDA did not pin {num_bytes / 2**20:,.0f} MiB of memory for the states (error {code}): "
            "select fewer depths with --states, or give this worker more memory"
        )
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data)
    return memory
