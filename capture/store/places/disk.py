"""Files that are still there after a crash: write, sync, publish under a final name.

The order is always data, directory, then the name that vouches for them, each synced before the next.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from ....errors import FULL, REFUSED, NoFileError, StoreFullError, StoreRefusedError

Identity = tuple[int, int, int]

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # what file systems without hard links answer


def write_new(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Writes a file that must not exist yet. Not synced: `sync` follows, for many files at once."""
    view = memoryview(data)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, and nothing else: a link may lead anywhere, a pipe never ends.

    Raises:
        FileNotFoundError: there is none.
        NoFileError: it is something else.
        OSError: it cannot be read.
    """
    require_file(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    return os.fdopen(descriptor, "rb")


def require_file(path: Path) -> None:
    """Makes sure that what has a name is a file.

    Raises:
        FileNotFoundError: there is nothing.
        NoFileError: it is something else.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise NoFileError(f"{path} is no file, and a store has one there: move it away and run this again")


def replace(path: Path, data: bytes) -> None:
    """Replaces a file, or makes it; readers see the old or the new content whole."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    try:
        write_new(new, data)
        sync([new])
        os.replace(new, path)
    except OSError:
        with suppress(OSError):  # what was written of it takes room that may be needed
            new.unlink()
        raise
    sync([path.parent])


def sync(paths: Iterable[Path]) -> None:
    """Waits until files and directories are on the disk; in parallel, as one journal commit serves many."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_sync_one, paths))


def sync_tree(root: Path) -> None:
    """`sync` for a directory and everything below it."""
    sync([root, *root.rglob("*")])


def publish(source: Path, target: Path) -> None:
    """Gives a finished file its final name, unless something has that name.

    A hard link fails where the name is taken. File systems without hard links get a rename, which does not:
    there the name is looked at just before, and callers compare identities afterwards. A network file system
    may report an error of what it has done, because the answer got lost: the file's own state is believed.

    Raises:
        FileExistsError: the name is taken.
    """
    num_links, ours = os.stat(source).st_nlink, identity(source)
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NO_LINKS:
            _rename_new(source, target)
        elif identity(target) != ours and os.stat(source).st_nlink <= num_links:
            raise


def _rename_new(source: Path, target: Path) -> None:
    ours = identity(source)
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        os.rename(source, target)
    except OSError:
        if identity(target) != ours:
            raise


def identity(path: Path) -> Identity | None:
    """Returns what tells a file from others, whatever it is renamed to; None if there is no file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns  # numbers of deleted files are used again


def file_record(content: bytes) -> dict[str, Any]:
    """Returns what a store notes of a file that it writes: `bytes` and `crc32c`, eight hex digits."""
    return {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}


def check_room(path: Path, task: str, needed_bytes: int, num_files: int) -> None:
    """Raises StoreFullError if a disk has less room than a task needs, in bytes or in files (inodes)."""
    room = os.statvfs(path)  # 0 blocks or files in all: the file system does not count them
    free_bytes, free_files = room.f_bavail * room.f_frsize, room.f_favail
    if room.f_blocks and free_bytes < needed_bytes:
        raise StoreFullError(
            f"no room left to write {task} in {path}: it needs up to {needed_bytes / 1e6:,.1f} MB, "
            f"{free_bytes / 1e6:,.1f} MB are free; make room and run the same command again"
        )
    if room.f_files and free_files < num_files:
        raise StoreFullError(
            f"no room left to write {task} in {path}: it needs {num_files} files, and the file system can "
            f"make {free_files} more; delete files there and run the same command again"
        )


@contextmanager
def full_disk_named(path: Path, task: str, needed_bytes: int) -> Iterator[None]:
    """Turns "no space left", "read-only" and "permission denied" into a message that says what was being
    written and what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreFullError(
                f"no room left to write {task} in {path} ({os.strerror(error.errno)}): it needs up to "
                f"{needed_bytes / 1e6:,.1f} MB, {_free(path)}; nothing of it was published; make room and "
                f"run the same command again"
            ) from error
        if error.errno in REFUSED:
            raise StoreRefusedError(
                f"{task} cannot be written in {path}: {os.strerror(error.errno)}; make it writable and run "
                f"the same command again"
            ) from error
        raise


def _free(path: Path) -> str:
    """Returns what is free on a disk, as text; the error that is being reported is not hidden by another."""
    try:
        room = os.statvfs(path)
    except OSError as error:
        return f"what is free is not known ({error.strerror})"
    no_files = " and no more files can be made" if room.f_files and not room.f_favail else ""
    return f"{room.f_bavail * room.f_frsize / 1e6:,.1f} MB are free{no_files}"


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
