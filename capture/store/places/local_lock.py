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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ....errors import StoreError
from . import lease
from .disk import write_new
from .liveness import machine, process_start


class DriverLock:
    """The lock while it is held; `held` turns False if another driver took it over."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)  # beats go to this file, never to a successor's
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

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises StoreLockedError unless the lock is held."""
        if not self.held:
            raise lease.lost(str(self._path.parent.parent))

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with _guard(self._path):
            if self.held:
                self._path.unlink()
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
    new_path = lock_path.with_name(f"driver.lock.{secrets.token_hex(8)}")
    write_new(new_path, json.dumps(mine).encode())
    try:
        with _guard(lock_path):
            holder = holder_of(lock_path)
            if holder is not None:
                raise lease.locked(str(lock_path.parent.parent), holder)
            os.replace(new_path, lock_path)
    finally:
        new_path.unlink(missing_ok=True)
    return DriverLock(lock_path)


def holder_of(lock_path: Path) -> dict[str, Any] | None:
    """Returns what the lock says of a live driver, with `silent_s`, seconds since its last sign of life."""
    try:
        holder = json.loads(lock_path.read_bytes())
        beat_s = lock_path.stat().st_mtime
    except FileNotFoundError:
        return None
    holder["silent_s"] = max(0.0, _file_system_time_s(lock_path.parent) - beat_s)
    if holder["machine"] == machine():
        return holder if process_start(holder["pid"]) == holder["process_start"] else None
    return holder if holder["silent_s"] < lease.STALE_S else None


@contextmanager
def _guard(lock_path: Path) -> Iterator[None]:
    """Holds a file lock while the driver lock is read and changed; the kernel frees it if its holder dies."""
    descriptor = os.open(lock_path.with_name("driver.guard"), os.O_CREAT | os.O_RDWR, 0o644)
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
