"""The driver lock in an object store: one object, changed only on condition that it is as it was seen.

Its holder changes it every few seconds; who sees it unchanged for `STALE_S`, by the server's clock, takes it
over. It is never deleted but marked as released, so that no release can hit a successor's lock.
"""

import json
import os
import platform
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ....errors import StoreError, StoreLockedError
from ..keys import DRIVER_LOCK
from . import lease
from .bucket import Bucket, make_token
from .liveness import machine, process_start


class ObjectLock:
    """The lock while it is held; `held` turns False if another driver took it over, or if this one could not
    say for so long that it lives that another may have.
    """

    def __init__(self, bucket: Bucket, over: str | None):
        """Takes the lock. Raises FileExistsError if another driver was quicker."""
        self._bucket, self._writer = bucket, make_token()
        self._num_beats = 0
        self._e_tag: str | None = None
        self._stop = threading.Event()
        self._put(over)
        self._thread = threading.Thread(target=self._beat, name="looptap heartbeat", daemon=True)
        self._thread.start()

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

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        return self._e_tag is not None and time.monotonic() - self._beat_s < lease.STALE_S

    def check(self) -> None:
        """Raises StoreLockedError unless the lock is held, by what the server says now."""
        found = self._bucket.find(DRIVER_LOCK)
        if found is None or found.writer != self._writer:
            raise StoreLockedError(f"another process took {self._bucket} over while this one was silent")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._e_tag is not None:
            with suppress(FileExistsError):  # it is a successor's
                self._put(self._e_tag, released=True)
        self._e_tag = None

    def _beat(self) -> None:
        while not self._stop.wait(lease.HEARTBEAT_S):
            try:
                self._put(self._e_tag)
            except FileExistsError:
                self._e_tag = None
                return
            except StoreError:
                continue  # the server may be back before the lock lapses

    def _put(self, over: str | None, released: bool = False) -> None:
        """Puts the lock with content that differs from before, so that nobody's condition holds any more."""
        self._num_beats += 1
        mine = {
            "host": platform.node(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "machine": machine(),
            "writer": self._writer,
            "beat": self._num_beats,
            "released": released,
        }
        sent_s = time.monotonic()
        self._e_tag = self._bucket.put(DRIVER_LOCK, json.dumps(mine).encode(), writer=self._writer, over=over)
        self._beat_s = sent_s


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
        return holder if process_start(holder["pid"]) == holder["process_start"] else None
    return holder if lease.is_fresh(silent_s) else None
