"""An object store as zarr-python and xarray read it, whose requests wait for a server that is away."""

import asyncio
import builtins
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import obstore
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from .bucket import Bucket
from .server import Answer


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
        try:
            return prototype.buffer.from_bytes(
                await self._ask(f"read {key}", lambda: self._get(key, byte_range))
            )
        except FileNotFoundError:
            return None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> "builtins.list[Buffer | None]":
        gets = (self.get(key, prototype, byte_range) for key, byte_range in key_ranges)
        return list(await asyncio.gather(*gets))

    async def exists(self, key: str) -> bool:
        try:
            await self.getsize(key)
        except FileNotFoundError:
            return False
        return True

    async def getsize(self, key: str) -> int:
        return (await self._ask(f"look at {key}", lambda: obstore.head(self.store, key)))["size"]

    def list(self) -> AsyncGenerator[str, None]:
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        found = await self._ask("list the store", lambda: obstore.list(self.store, prefix or None).collect())
        for meta in found:
            yield meta["path"]

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        folder = prefix.rstrip("/")
        found = await self._ask(
            f"list {folder}", lambda: obstore.list_with_delimiter(self.store, folder or None)
        )
        for path in [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]:
            yield path.rpartition("/")[2]

    async def _ask(self, task: str, request: Callable[[], Answer]) -> Answer:
        return await asyncio.wrap_future(self._bucket.start(task, request))

    def _get(self, key: str, wanted: ByteRequest | None) -> bytes:
        match wanted:
            case None:
                return bytes(obstore.get(self.store, key).bytes())
            case RangeByteRequest(start=start, end=end):
                return bytes(obstore.get_range(self.store, key, start=start, end=end))
            case OffsetByteRequest(offset=offset):
                return bytes(obstore.get(self.store, key, options={"range": {"offset": offset}}).bytes())
            case SuffixByteRequest(suffix=suffix):
                return bytes(obstore.get(self.store, key, options={"range": {"suffix": suffix}}).bytes())
