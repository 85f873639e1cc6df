"""Holds what one attempt writes to an object store in memory until the commit, then puts it on conditions."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

from .bucket import Bucket
from .place import Bytes, Sink


class ObjectDraft:
    """One attempt's objects, in memory; see `place.Draft`."""

    def __init__(self, bucket: Bucket, writer: str):
        self._bucket, self._writer = bucket, writer
        self._sinks: dict[str, MemorySink] = {}

    def open_sink(self, key: str) -> Sink:
        self._sinks[key] = MemorySink()
        return self._sinks[key]

    def write(self, key: str, data: Bytes) -> None:
        sink = self.open_sink(key)
        sink.write_at(0, data)
        sink.close(len(data))

    def sync(self) -> None:
        pass  # an object is durable when the server has answered

    def publish(self, key: str, fence: Callable[[], None]) -> None:
        over: str | None = None
        for _ in range(4):
            try:
                self._bucket.put(key, self._sinks[key].data, writer=self._writer, over=over)
                return
            except FileExistsError:
                found = self._bucket.find(key)
                over = found.e_tag if found is not None else None
            fence()
        raise FileExistsError(f"{self._bucket}/{key} keeps being put by others")

    def sync_published(self, keys: Iterable[str]) -> None:
        pass

    def holds(self, key: str) -> bool:
        found = self._bucket.find(key)
        return found is not None and found.writer == self._writer

    def withdraw(self, key: str) -> None:
        if self.holds(key):
            self._bucket.remove([key])

    def discard(self) -> None:
        self._sinks.clear()


class MemorySink:
    """A file in memory, as long as what was written needs."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._lock = threading.Lock()

    def write_at(self, offset: int, data: Any) -> None:
        with self._lock, memoryview(data).cast("B") as view:
            if (end := offset + len(view)) > len(self.data):
                self.data.extend(bytes(end - len(self.data)))
            self.data[offset:end] = view

    def close(self, num_bytes: int) -> None:
        if num_bytes > len(self.data):
            self.data.extend(bytes(num_bytes - len(self.data)))
        del self.data[num_bytes:]

    def discard(self) -> None:
        self.data = bytearray()
