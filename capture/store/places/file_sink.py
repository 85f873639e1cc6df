"""A file written at any offsets by several threads, past the page cache where the file system takes that.

Terabytes through the page cache would evict everything else and cost several times the processor time.
"""

import errno
import os
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .aligned import PAGE_BYTES

_DROP_BYTES = 16 << 20  # through the cache: from here on it is emptied again
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}  # what O_DIRECT meets on tmpfs, some FUSE, odd sector sizes


class FileSink:
    """Writes one new file. Whole pages go by O_DIRECT, the rest through the page cache.

    `is_direct` is whether O_DIRECT has been used: None before the first whole page.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._direct: int | None = None
        self._lock = threading.Lock()
        self._cached_bytes = 0
        self.is_direct: bool | None = None

    def write_at(self, offset: int, data: Any) -> None:
        """Writes a buffer at an offset.

        Raises:
            OSError: the disk is full or broken; how much of it was written is not known.
        """
        view = memoryview(data).cast("B")
        while view:
            num_written = self._write_some(offset, view)
            offset, view = offset + num_written, view[num_written:]

    def close(self, num_bytes: int) -> None:
        """Completes the file, which is so long from now on; does not sync it."""
        os.ftruncate(self._descriptor, num_bytes)
        if self._cached_bytes >= _DROP_BYTES:  # only clean pages can be dropped
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._close()

    def discard(self) -> None:
        """Drops the file; what cannot be dropped goes with its folder."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._path.unlink()

    def _write_some(self, offset: int, view: memoryview) -> int:
        if self.is_direct is not False and _in_pages(offset, view):
            try:
                return os.pwrite(self._open_direct(), view, offset)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self.is_direct = False
        num_written = os.pwrite(self._descriptor, view, offset)
        if num_written >= PAGE_BYTES:
            # starts writing it out, and forgets what was written out meanwhile
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with self._lock:
                self._cached_bytes += num_written
        return num_written

    def _open_direct(self) -> int:
        with self._lock:
            if self._direct is None:
                self._direct = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
                self.is_direct = True
            return self._direct

    def _close(self) -> None:
        descriptors = [each for each in (self._direct, self._descriptor) if each is not None and each >= 0]
        self._descriptor, self._direct = -1, None
        with ExitStack() as stack:  # a network file system may say only now that it is full; both are closed
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)


def _in_pages(offset: int, view: memoryview) -> bool:
    address = np.frombuffer(view, np.uint8).ctypes.data
    return not (offset % PAGE_BYTES or len(view) % PAGE_BYTES or address % PAGE_BYTES)
