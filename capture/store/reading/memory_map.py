"""Files mapped one after the other into one stretch of address space, so that a gather reaches all of them.

A page that is not in the page cache yet stops who reads it until the disk has delivered it, page after page,
and the kernel reads 128 KiB around each. So where a few pages tried are missing, it is told of all that will
be wanted first: 64 random rows of a cold file then take 0.7 ms instead of 31.
"""

import ctypes
import math
import mmap
import os
from pathlib import Path

import numpy as np

from ....errors import NoFileError, StoreError
from ..places.disk import open_regular

_TRIED_PAGES = 8
_TRIED_RUNS = 8  # once so many were in memory, one of so many is tried: asking takes a microsecond
_SMALL_GAP_BYTES = 32 << 10  # the kernel reads over it anyway
_libc = ctypes.CDLL(None, use_errno=True)
_mincore = ctypes.PyDLL(None).mincore  # so short that letting other threads run takes longer
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """Address space for a number of files, each mapped when it is added; no descriptors are kept open.

    Args:
        file_bytes: the most that a file holds.
        item_bytes: files begin at multiples of it, so that `data` can be viewed as an array of them.
    """

    def __init__(self, num_files: int, file_bytes: int, item_bytes: int) -> None:
        step = math.lcm(mmap.PAGESIZE, item_bytes)
        self.file_bytes = -(-file_bytes // step) * step
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        # unmaps the files with itself, when the last array over it is gone
        self._room = mmap.mmap(-1, num_files * self.file_bytes, flags=flags, prot=mmap.PROT_READ)
        self.data = np.frombuffer(self._room, np.uint8)
        self._address = self.data.ctypes.data
        self._found = ctypes.c_ubyte(1)
        self._found_address = ctypes.addressof(self._found)
        self._resident_runs = self._untried_runs = 0

    def add(self, place: int, path: Path) -> np.ndarray:
        """Maps a file.

        Returns:
            its content, uint8.
        Raises:
            FileNotFoundError: it is not there.
            StoreError: it is larger than any such file can be, or cannot be mapped.
        """
        start = place * self.file_bytes
        try:
            with open_regular(path) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                if num_bytes > self.file_bytes:
                    raise OSError(f"it holds {num_bytes} bytes, more than can have been written")
                if num_bytes:
                    self._map(start, num_bytes, file.fileno())
        except (FileNotFoundError, NoFileError):
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        return self.data[start : start + num_bytes]

    def _map(self, start: int, num_bytes: int, descriptor: int) -> None:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(self._address + start, num_bytes, mmap.PROT_READ, flags, descriptor, 0) == _FAILED:
            raise OSError(ctypes.get_errno(), f"mapping it failed ({os.strerror(ctypes.get_errno())})")

    def will_need(self, starts: np.ndarray, num_bytes: int) -> None:
        """Makes the kernel read num_bytes bytes from each start on, unless they seem to be in memory."""
        if all(map(self._is_resident, starts[:: max(1, len(starts) // _TRIED_PAGES)].tolist())):
            return
        starts = np.sort(starts)
        edges = np.flatnonzero(starts[1:] - starts[:-1] > num_bytes + _SMALL_GAP_BYTES) + 1
        firsts, lasts = starts[np.r_[0, edges]], starts[np.r_[edges - 1, len(starts) - 1]] + num_bytes
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            self._advise(first, last)

    def will_need_run(self, start: int, num_bytes: int) -> None:
        """Does what `will_need` does for bytes that lie together, judged by their last page alone."""
        if self._untried_runs:
            self._untried_runs -= 1
        elif self._is_resident(start + num_bytes - 1):
            self._resident_runs += 1
            if self._resident_runs >= _TRIED_RUNS:
                self._untried_runs = _TRIED_RUNS - 1
        else:
            self._resident_runs = 0
            self._advise(start, start + num_bytes)

    def _advise(self, start: int, stop: int) -> None:
        page = start - start % mmap.PAGESIZE
        self._room.madvise(mmap.MADV_WILLNEED, page, stop - page)

    def _is_resident(self, offset: int) -> bool:
        """Whether the page there is in memory; True where that cannot be found out."""
        # shared by threads: at worst one asks ahead for what another one misses
        _mincore(self._address + offset - offset % mmap.PAGESIZE, 1, self._found_address)
        return self._found.value & 1 == 1


_MAP_FIXED = 0x10  # on Linux and macOS alike; Python has no name for it
