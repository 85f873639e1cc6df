"""Memory that starts at a page, which files opened past the page cache ask for."""

import mmap

import numpy as np

PAGE_BYTES = 4096  # what O_DIRECT asks of addresses, offsets and lengths, on every disk in use today


def page_aligned(num_bytes: int) -> np.ndarray:
    """Allocates memory that O_DIRECT takes, uint8."""
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a page fault in 2 MiB instead of 512
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
