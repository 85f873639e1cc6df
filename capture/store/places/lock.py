"""Keeps drivers to one at a time, whatever place the store lies in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....errors import os_errors_named
from ..keys import DRIVER_LOCK
from .directory import LocalPlace
from .local_lock import DriverLock, acquire, holder_of
from .object_lock import ObjectLock, object_lock_holder
from .open import open_place


@contextmanager
def driver_lock(path: str | Path) -> Iterator[DriverLock | ObjectLock]:
    """Holds the store's driver lock.

    Raises:
        StoreLockedError: another driver is at work; the message names its host and process.
        StoreError: the place cannot keep drivers apart.
    """
    place = open_place(path)
    is_local = isinstance(place, LocalPlace)
    with os_errors_named(place.address, "written"):
        lock = acquire(place.path / DRIVER_LOCK) if is_local else ObjectLock.acquire(place)
    with lock:
        yield lock


def lock_holder(path: str | Path) -> dict[str, Any] | None:
    """Returns who drives the store now (host, pid, silent_s); None if nobody alive does."""
    place = open_place(path)
    if isinstance(place, LocalPlace):
        with os_errors_named(place.path, "read"):
            return holder_of(place.path / DRIVER_LOCK)
    return object_lock_holder(place)
