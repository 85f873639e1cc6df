"""One driver at a time: `.looptap/driver.lock` says who it is, its modification time that it lives.

A killed driver must not keep its successor waiting, so on the same machine the process itself is looked up;
elsewhere only a heartbeat tells, and after `STALE_S` without one the lock is taken over. Even a take-over
that was wrong (a driver stopped for minutes) does no harm: attempts are fenced (`commit.py`).
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
from typing import TYPE_CHECKING, Any

from ....errors import StoreError, StoreLockedError
from .directory import LocalPlace
from .disk import write_new
from .liveness import machine, process_start
from .place import open_place

if TYPE_CHECKING:
    from .object_lock import ObjectLock

HEARTBEAT_S = 10.0
STALE_S = 60.0


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

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with _guard(self._path):
            if self.held:
                self._path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with suppress(OSError):  # a server that is away for a moment
                os.utime(self._descriptor)


@contextmanager
def driver_lock(path: str | Path) -> Iterator["DriverLock | ObjectLock"]:
    """Hold the store's driver lock.

    Raises:
        StoreLockedError: another driver is at work; the message names its host and process.
        StoreError: the place cannot keep drivers apart.
    """
    place = open_place(path)
    if isinstance(place, LocalPlace):
        lock = _acquire(place.path / ".looptap" / "driver.lock")
    else:
        from .object_lock import ObjectLock

        lock = ObjectLock.acquire(place)
    try:
        yield lock
    finally:
        lock.release()


def lock_holder(path: str | Path) -> dict[str, Any] | None:
    """Who drives the store now (host, pid, silent_s), or None if nobody alive does."""
    place = open_place(path)
    if isinstance(place, LocalPlace):
        return _holder(place.path / ".looptap" / "driver.lock")
    from .object_lock import object_lock_holder

    return object_lock_holder(place)


def locked(store: str, holder: dict[str, Any]) -> StoreLockedError:
    """The error of who comes second."""
    return StoreLockedError(
        f"{store} is being written by process {holder['pid']} on {holder['host']} "
        f"(last sign of life {holder['silent_s']:.0f} s ago): wait for it or stop it; "
        f"its lock lapses after {STALE_S:.0f} s without a sign of life"
    )


def _acquire(lock_path: Path) -> DriverLock:
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
            holder = _holder(lock_path)
            if holder is not None:
                raise locked(str(lock_path.parent.parent), holder)
            os.replace(new_path, lock_path)
    finally:
        new_path.unlink(missing_ok=True)
    return DriverLock(lock_path)


def _holder(lock_path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(lock_path.read_bytes())
        beat_s = lock_path.stat().st_mtime
    except FileNotFoundError:
        return None
    holder["silent_s"] = max(0.0, _file_system_time_s(lock_path.parent) - beat_s)
    if holder["machine"] == machine():
        return holder if process_start(holder["pid"]) == holder["process_start"] else None
    return holder if holder["silent_s"] < STALE_S else None


@contextmanager
def _guard(lock_path: Path) -> Iterator[None]:
    """Serialise looking at the lock and changing it; the kernel opens this one when its holder dies."""
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
    """Now by the clock that stamps the lock, which on a network file system is the server's."""
    probe = directory / f"clock.{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
