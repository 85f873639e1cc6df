"""An object store as zarr-python and xarray read it, whose requests wait for a server that is away."""

import builtins
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from .bucket import Bucket


class PatientReads(ObjectStore[Any]):
    """zarr-python's own store for obstore, with every request that reads made through a bucket's door."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket.client, read_only=True)
        self._bucket = bucket

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._bucket,)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        get = super().get
        return await self._bucket.ask_async(f"read {key}", lambda: get(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> "builtins.list[Buffer | None]":
        get, ranges = super().get_partial_values, list(key_ranges)
        return await self._bucket.ask_async("read ranges", lambda: get(prototype, ranges))

    async def exists(self, key: str) -> bool:
        exists = super().exists
        return await self._bucket.ask_async(f"look at {key}", lambda: exists(key))

    async def getsize(self, key: str) -> int:
        getsize = super().getsize
        return await self._bucket.ask_async(f"look at {key}", lambda: getsize(key))

    def list(self) -> AsyncGenerator[str, None]:
        return self._all_at_once("the store", super().list)

    def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        names = super().list_prefix
        return self._all_at_once(prefix, lambda: names(prefix))

    def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        names = super().list_dir
        return self._all_at_once(prefix, lambda: names(prefix))

    async def _all_at_once(
        self, what: str, names: Callable[[], AsyncGenerator[str, None]]
    ) -> AsyncGenerator[str, None]:
        """Yields names once all are there: a list that breaks off is asked for anew."""

        async def collect() -> "builtins.list[str]":
            return [name async for name in names()]

        for name in await self._bucket.ask_async(f"list {what}", collect):
            yield name
