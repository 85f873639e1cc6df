"""One attempt's files in a directory, until they have their final names.

Files are written in `.looptap/staging/<u>.<n>/`, synced, and linked to their final names: a link fails where
the name is taken. What another attempt left under a name is moved aside before it is replaced, never deleted
in place, so that a file which turns out to be wanted can go back.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from ..keys import STAGING
from . import disk
from .disk import Identity, identity, write_new
from .file_sink import FileSink
from .place import Bytes, Sink

_ASIDE = "aside."


def staged_name(key: str) -> str:
    """Returns the name in an attempt's folder of the file that is to become `key`."""
    return quote(key, safe="")


def aside_name(key: str) -> str:
    """Returns the name in an attempt's folder of the file that had `key` before."""
    return f"{_ASIDE}{staged_name(key)}"


class LocalDraft:
    """One attempt's staged files; see `place.Draft`."""

    def __init__(self, root: Path, name: str):
        self._root = root
        self.path = root / STAGING / name
        self.path.mkdir(parents=True)  # an empty folder may have been lost when the store was copied
        self._ours: dict[str, Identity | None] = {}

    def open_sink(self, key: str) -> Sink:
        return FileSink(self._staged(key))

    def write(self, key: str, data: Bytes) -> None:
        write_new(self._staged(key), data)

    def sync(self) -> None:
        disk.sync(self.path.iterdir())

    def publish(self, key: str, fence: Callable[[], None]) -> None:
        source, target = self._staged(key), self._root / key
        # before publishing: without hard links the staged name goes away
        ours = self._ours[key] = identity(source)
        for _ in range(3):
            try:
                disk.publish(source, target)
                return
            except FileExistsError:
                if identity(target) == ours:  # it was linked, and only the answer got lost
                    return
            fence()
            self._take_away(key, lambda _: fence())
        raise FileExistsError(f"{target} keeps being made by others")

    def sync_published(self, keys: Iterable[str]) -> None:
        disk.sync({(self._root / key).parent for key in keys})

    def holds(self, key: str) -> bool:
        return key in self._ours and identity(self._root / key) == self._ours[key]

    def withdraw(self, key: str) -> None:
        if self.holds(key):
            with suppress(_NotOursError):
                self._take_away(key, self._require_ours)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _staged(self, key: str) -> Path:
        return self.path / staged_name(key)

    def _take_away(self, key: str, check: Callable[[Path], None]) -> None:
        """Frees a final name; the file that had it goes back if `check`, given its new path, raises.

        Between deciding and doing, an attempt may be paused for any time, and the file be another by then:
        only after it was moved does it stay what it is.
        """
        aside = self.path / aside_name(key)
        try:
            os.rename(self._root / key, aside)
        except FileNotFoundError:
            return
        try:
            disk.require_file(aside)
            check(aside)
        except BaseException:
            self._put_back(aside, self._root / key)
            raise

    def _put_back(self, aside: Path, target: Path) -> None:
        if aside.is_dir() and not aside.is_symlink():  # has no links; what came meanwhile stays
            with suppress(OSError):
                os.rename(aside, target)
        else:
            with suppress(FileExistsError):
                disk.publish(aside, target)

    def _require_ours(self, aside: Path) -> None:
        key = unquote(aside.name.removeprefix(_ASIDE))
        if identity(aside) != self._ours[key]:
            raise _NotOursError


class _NotOursError(Exception):
    """Another attempt's file has the name by now."""
