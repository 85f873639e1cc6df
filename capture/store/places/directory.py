"""A store in a local or network directory.

Files are written in `.looptap/staging/<u>.<n>/`, synced, and linked to their final names: a link fails where
the name is taken. What another attempt left under a name is moved aside before it is replaced, never deleted
in place, so that a file which turns out to be wanted can go back.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from ....errors import REFUSED, StoreError, StoreExistsError, StoreRefusedError
from ..keys import ATTEMPTS, LEDGER, STAGING
from . import disk
from .disk import Identity, identity, write_new
from .file_sink import FileSink
from .liveness import machine, process_start
from .place import Bytes, Item, Result, Sink

_ASIDE = "aside."


class LocalPlace:
    """A directory; see `place.Place`."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def address(self) -> str:
        return str(self.path.absolute())

    def names(self, folder: str) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.path / folder)]
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise StoreExistsError(f"{self.path} is a file, not a store: choose another path") from None
        except OSError as error:
            raise _unreadable(self.path / folder, error) from error

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            entries = list(os.scandir(self.path / folder))
        except FileNotFoundError:
            return {}
        sizes = {}
        for entry in entries:
            with suppress(FileNotFoundError):  # a temporary name, gone since
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    def exists(self, key: str) -> bool:
        path = self.path / key
        try:
            # opening the folder makes a network file system ask its server, not its memory
            descriptor = os.open(path.parent, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            os.stat(path.name, dir_fd=descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return False
        finally:
            os.close(descriptor)
        return True

    def read(self, key: str) -> bytes:
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise _unreadable(self.path / key, error) from error

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        descriptor = os.open(self.path / key, os.O_RDONLY)
        try:
            return os.pread(descriptor, num_bytes, offset)
        finally:
            os.close(descriptor)

    def create(self, key: str, data: bytes) -> None:
        path = self.path / key
        write_new(path, data)
        disk.sync([path, path.parent] if data else [path.parent])

    def replace(self, key: str, data: bytes) -> None:
        disk.replace(self.path / key, data)

    def remove(self, keys: Iterable[str]) -> None:
        paths = [self.path / key for key in keys]
        for path in paths:
            path.unlink(missing_ok=True)
        disk.sync({path.parent for path in paths})

    def make(self, fill: Callable[[Path], None]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new_path = _new_path(self.path)
        try:
            new_path.mkdir()
            fill(new_path)
            for folder in (LEDGER, ATTEMPTS, STAGING):
                (new_path / folder).mkdir(parents=True)
            disk.sync_tree(new_path)
            try:
                os.rename(new_path, self.path)
            except OSError as error:
                if self.names(""):
                    raise StoreExistsError(
                        f"{self.path} was made by another process just now: open it"
                    ) from error
                raise
            disk.sync([self.path.parent])
        finally:
            shutil.rmtree(new_path, ignore_errors=True)

    def holds_leftovers_only(self) -> bool:
        return False  # a directory appears whole

    def begin(self, unit: int, number: int) -> "LocalDraft":
        return LocalDraft(self.path, f"{unit}.{number}")

    def clean_drafts(self) -> None:
        for folder in list(os.scandir(self.path / STAGING)):
            unit = folder.name.partition(".")[0]
            if self.exists(f"{LEDGER}/{unit}.json"):
                self._put_back(Path(folder.path))
            shutil.rmtree(folder.path, ignore_errors=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return [function(item) for item in items]

    def free_bytes(self) -> int | None:
        path = self.path.absolute()
        usage = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists()))
        return usage.free if usage.total else None

    def check_room(self, task: str, needed_bytes: int, num_files: int) -> None:
        """Raises StoreFullError if there is less room than the task needs."""
        disk.check_room(self.path, task, needed_bytes, num_files)

    def full_disk_named(self, task: str, needed_bytes: int) -> AbstractContextManager[None]:
        return disk.full_disk_named(self.path, task, needed_bytes)

    def zarr_store(self) -> str:
        return str(self.path)

    def _put_back(self, staging_path: Path) -> None:
        """Puts back files of a committed unit that an attempt, killed in `_take_away`, had moved aside."""
        for path in staging_path.glob(f"{_ASIDE}*"):
            key = unquote(path.name.removeprefix(_ASIDE))
            if not key.startswith("."):  # an entry that was to be replaced is better missing
                with suppress(FileExistsError):
                    disk.publish(path, self.path / key)
                    disk.sync([(self.path / key).parent])


class LocalDraft:
    """One attempt's staged files; see `place.Draft`."""

    def __init__(self, root: Path, name: str):
        self._root = root
        self.path = root / STAGING / name
        self.path.mkdir()
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
        return self.path / quote(key, safe="")

    def _take_away(self, key: str, check: Callable[[Path], None]) -> None:
        """Frees a final name; the file that had it goes back if `check`, given its new path, raises.

        Between deciding and doing, an attempt may be paused for any time, and the file be another by then:
        only after it was moved does it stay what it is.
        """
        aside = self.path / f"{_ASIDE}{quote(key, safe='')}"
        try:
            os.rename(self._root / key, aside)
        except FileNotFoundError:
            return
        try:
            check(aside)
        except BaseException:
            with suppress(FileExistsError):
                disk.publish(aside, self._root / key)
            raise

    def _require_ours(self, aside: Path) -> None:
        key = unquote(aside.name.removeprefix(_ASIDE))
        if identity(aside) != self._ours[key]:
            raise _NotOursError


class _NotOursError(Exception):
    """Another attempt's file has the name by now."""


def _unreadable(path: Path, error: OSError) -> StoreError:
    kind = StoreRefusedError if error.errno in REFUSED else StoreError
    return kind(f"{path} cannot be read: {error.strerror}")


def _new_path(path: Path) -> Path:
    """Returns a name beside the store to build it under; removes leftovers of killed builders on the way."""
    prefix = f".{path.name}.new-{machine()}-"
    for left in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        pid, _, start = left.name.removeprefix(prefix).partition("-")
        if str(process_start(int(pid))) != start:
            shutil.rmtree(left)
    new_path = path.parent / f"{prefix}{os.getpid()}-{process_start(os.getpid())}"
    shutil.rmtree(new_path, ignore_errors=True)
    return new_path
