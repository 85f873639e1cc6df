"""A store in a local or network directory: what is there, and how a store comes to be there whole.

Only files below its own folder are read or written, and nothing but files: no links, no pipes.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePosixPath

from ....errors import (
    REFUSED,
    NoFileError,
    StoreDeniedError,
    StoreError,
    StoreExistsError,
    StoreUnreadableError,
)
from ..keys import ATTEMPTS, LEDGER, STAGING
from . import disk
from .directory_draft import LocalDraft, aside_name, staged_name
from .disk import open_regular, write_new
from .liveness import machine, process_start
from .place import Item, Result


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
        return [entry.name for entry in self._scan(folder)]

    def file_names(self, folder: str) -> list[str]:
        return [entry.name for entry in self._scan(folder) if entry.is_file(follow_symlinks=False)]

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        path = self._inside(folder) if folder else self.path
        try:
            return list(os.scandir(path))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            if folder:
                return []
            raise StoreExistsError(f"{self.path} is a file, not a store: choose another path") from None
        except OSError as error:
            raise _unreadable(path, error) from error

    def sizes(self, folder: str) -> dict[str, int]:
        sizes = {}
        for entry in self._scan(folder):
            with suppress(FileNotFoundError):  # a temporary name, gone since
                if entry.is_file(follow_symlinks=False):
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def exists(self, key: str) -> bool:
        path = self._inside(key) if key else self.path
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
        except OSError as error:
            raise _unreadable(path, error) from error
        finally:
            os.close(descriptor)
        return True

    def refuse_links(self, folders: Iterable[str]) -> None:
        for folder in folders:
            path = self._inside(folder)
            try:
                is_link = path.is_symlink()
            except OSError as error:
                raise _unreadable(path, error) from error
            if is_link:
                raise StoreError(
                    f"{path} is a symbolic link, and a store has none: whoever made it may have it lead "
                    "anywhere; put what it leads to in its place if that is what you want"
                )

    def read(self, key: str) -> bytes:
        path = self._inside(key)
        try:
            with open_regular(path) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, NoFileError):
            raise
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        path = self._inside(key)
        try:
            with open_regular(path) as file:
                return os.pread(file.fileno(), num_bytes, offset)
        except (FileNotFoundError, NoFileError):
            raise
        except OSError as error:
            raise _unreadable(path, error) from error

    def create(self, key: str, data: bytes) -> None:
        path = self._inside(key)
        write_new(path, data)
        disk.sync([path, path.parent] if data else [path.parent])

    def replace(self, key: str, data: bytes) -> None:
        disk.replace(self._inside(key), data)

    def remove(self, keys: Iterable[str]) -> None:
        paths = [self._inside(key) for key in keys]
        for path in paths:
            path.unlink(missing_ok=True)
        disk.sync({path.parent for path in paths})

    def make(self, fill: Callable[[Path], None]) -> None:
        path = self.path.resolve()  # through a link to an empty folder, the store comes where that is
        if self.path.is_symlink() and not path.exists():
            raise StoreExistsError(
                f"{self.path} is a link to {path}, which is not there: make it, or choose another path"
            )
        if path.is_mount():
            raise StoreExistsError(
                f"{self.path} is where a disk is mounted, and a store appears by the renaming of its folder: "
                f"give a path below it, such as {self.path / 'run.zarr'}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        new_path = _new_path(path)
        try:
            new_path.mkdir()
            fill(new_path)
            for folder in (LEDGER, ATTEMPTS, STAGING):
                (new_path / folder).mkdir(parents=True)
            disk.sync_tree(new_path)
            try:
                os.rename(new_path, path)
            except OSError as error:
                if self.names(""):
                    raise StoreExistsError(
                        f"{self.path} was made by another process just now: open it"
                    ) from error
                raise
            disk.sync([path.parent])
        finally:
            shutil.rmtree(new_path, ignore_errors=True)

    def holds_leftovers_only(self) -> bool:
        return False  # a directory appears whole

    def begin(self, unit: int, number: int) -> LocalDraft:
        return LocalDraft(self.path, f"{unit}.{number}")

    def clean_draft(self, name: str, keys: Collection[str], put_back: Collection[str]) -> None:
        folder = self._inside(f"{STAGING}/{name}")
        if folder.is_symlink() or not folder.is_dir():
            return
        for key in keys:
            staged, aside = folder / staged_name(key), folder / aside_name(key)
            if key in put_back and _is_file(aside):
                with suppress(FileExistsError):
                    disk.publish(aside, self._inside(key))
                    disk.sync([self._inside(key).parent])
            for path in (staged, aside):
                if _is_file(path):
                    path.unlink()
        with suppress(OSError):  # it holds what is not ours
            folder.rmdir()

    def restore_folders(self, folders: Iterable[str]) -> None:
        for folder in folders:
            path = self._inside(folder)
            if not path.exists():
                path.mkdir(parents=True, exist_ok=True)
                disk.sync([path.parent])

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

    def _inside(self, key: str) -> Path:
        """Returns the path of a key.

        Raises:
            StoreError: it would lead out of the store. No key that `layout` checked does.
        """
        pure = PurePosixPath(key)
        if not key or pure.is_absolute() or ".." in pure.parts or "\0" in key:
            raise StoreError(f"{self.path} names {key!r}, which is no file of a store")
        return self.path / key


def _unreadable(path: Path, error: OSError) -> StoreError:
    kind = StoreDeniedError if error.errno in REFUSED else StoreUnreadableError
    return kind(f"{path} cannot be read: {error.strerror}")


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _new_path(path: Path) -> Path:
    """Returns a name beside the store to build it under; removes leftovers of killed builders on the way."""
    # of one length, as the store's own name may be as long as a file system takes
    prefix = f".looptap-new-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-{machine()}-"
    for left in path.parent.iterdir():
        of_process = re.fullmatch(f"{re.escape(prefix)}([0-9]+)-([0-9]+)", left.name)
        if of_process and left.is_dir() and not left.is_symlink():
            pid, start = map(int, of_process.groups())
            if process_start(pid) != start:
                shutil.rmtree(left)
    new_path = path.parent / f"{prefix}{os.getpid()}-{process_start(os.getpid())}"
    shutil.rmtree(new_path, ignore_errors=True)
    return new_path
