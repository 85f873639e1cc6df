"""The driver lock on a disk: `.looptap/driver.lock` says who drives, its modification time that it lives.

A killed driver must not keep its successor waiting, so on the same machine the process itself is looked up;
elsewhere only a heartbeat tells, and after `STALE_S` without one the lock is taken over. Even a take-over
that was wrong (a driver stopped for minutes) does no harm: attempts are fenced (`writing/attempt.py`).
"""

import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ....errors import StoreError, os_errors_named
from ..keys import GUARD, passing_for
from . import lease
from .disk import open_regular, sync, write_new
from .liveness import machine, process_start


class DriverLock:
    """The lock while it is held; `held` turns False if another driver took it over.

    Beside what it says, its file is locked for as long as its holder lives, where the file system can.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)  # beats go to this file, never to a successor's
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="looptap heartbeat", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> "DriverLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with os_errors_named(self._path, "written"):
                self.release()
        else:
            with suppress(OSError):  # a disk that is read-only by now; the lock lapses with this process
                self.release()

    def check(self) -> None:
        """Raises StoreLockedError unless the lock is held."""
        if not self.held:
            raise lease.lost(str(self._path.parent.parent))

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            with _guard(self._path):
                if self.held:
                    self._path.unlink()
        finally:
            os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._stop.wait(lease.HEARTBEAT_S):
            with suppress(OSError):  # a server that is away for a moment
                os.utime(self._descriptor)


def acquire(lock_path: Path) -> DriverLock:
    """Takes the lock; raises StoreLockedError with who holds it, StoreError where files cannot be locked."""
    mine = {
        "host": platform.node(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "machine": machine(),
    }
    with _guard(lock_path):
        _remove_leftovers(lock_path.parent)
        holder = _holder(lock_path, _file_system_time_s(lock_path.parent))
        if holder is not None:
            raise lease.locked(str(lock_path.parent.parent), holder)
        new_path = lock_path.with_name(f"driver.lock.{secrets.token_hex(8)}")
        write_new(new_path, json.dumps(mine).encode())
        sync([new_path])
        os.replace(new_path, lock_path)
        sync([lock_path.parent])
    return DriverLock(lock_path)


def holder_of(lock_path: Path) -> dict[str, Any] | None:
    """Returns what the lock says of a live driver, with `silent_s`, seconds since its last sign of life.

    By this machine's clock: looking at a store writes nothing.
    """
    return _holder(lock_path, time.time())


def _holder(lock_path: Path, now_s: float) -> dict[str, Any] | None:
    try:
        with open_regular(lock_path) as file:
            holder, beat_s = lease.parse(file.read()), os.fstat(file.fileno()).st_mtime
            if holder is None and _is_locked(file.fileno()):
                # damaged, and its holder lives; one that a crash cut short is nobody's
                return {"host": "an unknown host", "pid": 0, "silent_s": max(0.0, now_s - beat_s)}
    except FileNotFoundError:
        return None
    if holder is None:
        return None
    holder["silent_s"] = max(0.0, now_s - beat_s)
    if holder["machine"] == machine():
        if process_start(holder["pid"]) != holder["process_start"]:
            return None
        if holder["pid"] != os.getpid():
            return holder
        # ours: one that could not be removed, as the disk was read-only, beats no more
    return holder if lease.is_fresh(now_s - beat_s) else None


def _is_locked(descriptor: int) -> bool:
    """Whether a live process has the file locked; False where that cannot be found out."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remove_leftovers(folder: Path) -> None:
    """Removes what others left that were killed while they looked at the lock; nobody else looks now."""
    for path in list(folder.iterdir()):
        if passing_for(path.name) == "driver.lock" and not path.is_symlink() and path.is_file():
            path.unlink()


@contextmanager
def _guard(lock_path: Path) -> Iterator[None]:
    """Holds a file lock while the driver lock is read and changed; the kernel frees it if its holder dies."""
    path = lock_path.parent.parent / GUARD
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise StoreError(
                f"{lock_path.parent} is on a file system that cannot lock files ({error.strerror}): "
                f"mount it with locks, or put the store elsewhere"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _file_system_time_s(directory: Path) -> float:
    """Returns the time by the clock that stamps the lock, on a network file system the server's."""
    probe = directory / f"clock.{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
