"""Files that are still there after a crash: write, sync, publish under a final name.

The order is always data, directory, then the name that vouches for them, each synced before the next.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from ....errors import FULL, NoFileError, StoreFullError

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
    write_new(new, data)
    sync([new])
    os.replace(new, path)
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
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns  # numbers of deleted files are used again


def file_record(content: bytes) -> dict[str, Any]:
    """Returns what a store notes of a file that it writes: `bytes` and `crc32c`, eight hex digits."""
    return {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}


@contextmanager
def full_disk_named(path: Path, task: str, needed_bytes: int) -> Iterator[None]:
    """Turns "no space left" into a message that says what was being written and how much room it needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free_bytes = shutil.disk_usage(path).free
        raise StoreFullError(
            f"no room left to write {task} in {path} ({os.strerror(error.errno)}): it needs up to "
            f"{needed_bytes / 1e6:,.1f} MB, {free_bytes / 1e6:,.1f} MB are free; nothing of it was "
            f"published; make room and run the same command again"
        ) from error


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
