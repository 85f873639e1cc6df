"""The driver lock in an object store: one object, changed only on condition that it is as it was seen.

Its holder changes it every few seconds; who sees it unchanged for `STALE_S`, by the server's clock, takes it
over. It is never deleted but marked as released, so that no release can hit a successor's lock.
"""

import json
import os
import platform
import threading
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ....errors import StoreUnreachableError
from ..keys import DRIVER_LOCK
from . import lease
from .bucket import Bucket, make_token
from .liveness import machine, process_start
from .server import start

RELEASE_S = 1.5  # time for the last beat, and for a release after an error: the server may be away

_held_here = set[str]()  # writers of locks that this process holds


class ObjectLock:
    """The lock while it is held; `held` turns False if another driver took it over.

    Only the server can tell that: another takes the lock over by a put there. While it is away nobody can, so
    a beat waits for it as all requests do, and is the first to hear.
    """

    def __init__(self, bucket: Bucket, over: str | None):
        """Takes the lock. Raises FileExistsError if another driver was quicker."""
        self._bucket, self._writer = bucket, make_token()
        self._num_beats = 0
        self._e_tag: str | None = self._put(self._writer, over)
        _held_here.add(self._writer)
        self._stop = threading.Event()
        self._beating = start(lambda _: self._beat())

    @classmethod
    def acquire(cls, bucket: Bucket) -> "ObjectLock":
        """Takes the lock. Raises StoreLockedError with who holds it; StoreError as `Bucket.probe` does."""
        now = bucket.probe()
        found = bucket.find(DRIVER_LOCK)
        if found is not None and (holder := _read(bucket, now)) is not None:
            raise lease.locked(str(bucket), holder)
        try:
            return cls(bucket, found.e_tag if found is not None else None)
        except FileExistsError:
            holder = _read(bucket, now) or {"pid": "?", "host": "another host", "silent_s": 0.0}
            raise lease.locked(str(bucket), holder) from None

    def __enter__(self) -> "ObjectLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.release()
        else:
            with suppress(StoreUnreachableError, TimeoutError):  # the lock lapses then
                self.release(RELEASE_S)

    @property
    def held(self) -> bool:
        """Raises StoreError if the lock could not be kept: the server is away for too long, or refuses."""
        if self._beating.done():
            self._beating.result()
        return self._e_tag is not None

    def check(self) -> None:
        """Raises StoreLockedError unless the lock is held, by what the server says now."""
        found = self._bucket.find(DRIVER_LOCK)
        if found is None or found.writer != self._writer:
            raise lease.lost(str(self._bucket))

    def release(self, timeout_s: float | None = None) -> None:
        """Marks the lock as released. Raises TimeoutError: the server takes longer than that."""
        _held_here.discard(self._writer)
        self._stop.set()
        wait([self._beating], RELEASE_S)
        while not self._beating.done():  # its beat waits for a server that is away
            self._bucket.give_up()
            wait([self._beating], 0.05)
        releasing = start(lambda _: self._release())
        try:
            releasing.result(timeout_s)
        finally:
            if not releasing.done():
                self._bucket.give_up()

    def _release(self) -> None:
        released = make_token()  # not the beats' writer, of which one may be under way
        for _ in range(3):
            found = self._bucket.find(DRIVER_LOCK)
            if found is None or found.writer != self._writer:
                return  # it is a successor's
            with suppress(FileExistsError):
                self._put(released, found.e_tag)
                return

    def _beat(self) -> None:
        while not self._stop.wait(lease.HEARTBEAT_S):
            try:
                self._e_tag = self._put(self._writer, self._e_tag)
            except FileExistsError:
                self._e_tag = None
                return
            except CancelledError:  # by the release
                return

    def _put(self, writer: str, over: str | None) -> str:
        """Puts the lock with content that differs from before, so that nobody's condition holds any more."""
        self._num_beats += 1
        mine = {
            "host": platform.node(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "machine": machine(),
            "writer": self._writer,
            "beat": self._num_beats,
            "released": writer != self._writer,
        }
        return self._bucket.put(DRIVER_LOCK, json.dumps(mine).encode(), writer=writer, over=over)


def object_lock_holder(bucket: Bucket) -> dict[str, Any] | None:
    """Returns what `lock_holder` does, by this machine's clock: looking at a store must not write to it."""
    return _read(bucket, datetime.now(UTC))


def _read(bucket: Bucket, now: datetime) -> dict[str, Any] | None:
    found = bucket.find(DRIVER_LOCK)
    if found is None:
        return None
    holder = lease.parse(bucket.read(DRIVER_LOCK))
    if holder is None or holder.get("released"):
        return None  # a damaged one lapses: who holds it finds out by the next beat, which is conditional
    silent_s = (now - found.modified).total_seconds()
    holder["silent_s"] = max(0.0, silent_s)
    if holder["machine"] == machine():
        if holder["pid"] == os.getpid() and holder["writer"] not in _held_here:
            return None  # its release did not reach the server
        return holder if process_start(holder["pid"]) == holder["process_start"] else None
    return holder if lease.is_fresh(silent_s) else None
