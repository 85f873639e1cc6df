"""Reading that is tried again: a disk or server that fails for a moment says nothing about the bytes."""

import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from ....errors import StoreUnreadableError
from ..places.place import Place

Result = TypeVar("Result")

WAITS_S = (0.1, 0.4, 1.5)


class Patience:
    """Tries reads again after `WAITS_S`; what it waits in all is bounded, so that a place that is gone for
    good does not cost that for every file.

    Args:
        most_s: longest sum of all waits.
    """

    def __init__(self, most_s: float = 60.0):
        self._left_s = most_s
        self._lock = Lock()

    def read(self, place: Place, key: str) -> bytes | None:
        """Reads a file; None if there is none.

        Raises:
            NoFileError: something else has its name.
            StoreUnreadableError: it could not be read, whenever it was tried.
        """

        def read() -> bytes | None:
            try:
                return place.read(key)
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self.ask(read)

    def ask(self, read: Callable[[], Result]) -> Result:
        """Returns what `read` returns; raises the StoreUnreadableError of its last try."""
        for wait_s in WAITS_S:
            try:
                return read()
            except StoreUnreadableError:
                with self._lock:
                    is_spent = self._left_s < wait_s
                    self._left_s -= 0 if is_spent else wait_s
                if is_spent:
                    raise
                time.sleep(wait_s)
        return read()
