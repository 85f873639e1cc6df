"""A store in an object store that speaks S3.

Objects appear whole or not at all, so nothing is staged: an attempt holds its shards in memory and puts them
at commit, each on condition that the name is free. Where another attempt left something, it is replaced on
condition that it is still that: no object is deleted to make room, so none that is wanted can be.
"""

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ....errors import StoreExistsError
from ..keys import DRIVER_LOCK, MAKING, passing_for
from .bucket import Bucket, make_token
from .object_draft import ObjectDraft
from .object_lock import ObjectLock
from .place import Item, Result

NUM_REQUESTS = 8


class ObjectPlace(Bucket):
    """A store's place in a bucket; see `place.Place`."""

    def make(self, fill: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder, ObjectLock.acquire(self) as lock:
            fill(Path(folder))
            files = {
                str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()
            }
            left = self._leftovers()
            if left is None:
                raise StoreExistsError(f"{self.url} was made or filled by another process just now: open it")
            self.remove([key for key in left if key != MAKING])
            self.remove([key for key in left if key == MAKING])  # last: it says that the others may go
            writer = make_token()
            last = files.pop("zarr.json")
            try:
                self.put(MAKING, json.dumps({"writer": writer}).encode(), writer=writer, over=None)
                self.map(lambda key: self.put(key, files[key].read_bytes(), writer=writer, over=None), files)
                lock.check()
                # from now on there is a store
                self.put("zarr.json", last.read_bytes(), writer=writer, over=None)
            except FileExistsError as error:
                raise StoreExistsError(
                    f"{self.url} is being made by another process: open it then"
                ) from error
            self.remove([MAKING])

    def holds_leftovers_only(self) -> bool:
        return self._leftovers() is not None

    def begin(self, unit: int, number: int) -> ObjectDraft:
        return ObjectDraft(self, f"{unit}.{number}.{make_token()}")

    def refuse_links(self, folders: Iterable[str]) -> None:
        pass  # there are none

    def clean_draft(self, name: str, keys: Collection[str], put_back: Collection[str]) -> None:
        pass  # what was killed took its memory with it

    def restore_folders(self, folders: Iterable[str]) -> None:
        pass  # there are none

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            running = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in running]
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                # an error waits for what was begun, Ctrl-C for nothing: the server may be away
                while isinstance(error, KeyboardInterrupt) and not all(each.done() for each in running):
                    self.give_up()
                    time.sleep(0.05)
                raise

    def free_bytes(self) -> int | None:
        return None

    def full_disk_named(self, task: str, needed_bytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def zarr_store(self) -> Any:
        from .patient_reads import PatientReads

        return PatientReads(self)

    def _leftovers(self) -> list[str] | None:
        """Returns the keys that a killed `make` put here, without the lock; None if there is anything else.

        `make` says first whose objects will be its own. So one that lost its metadata, or anybody's else,
        is not taken for a beginning.
        """
        others = self._others()
        if not others:
            return [] if self.exists(DRIVER_LOCK) else None
        if MAKING not in others or "zarr.json" in others:
            return None
        making = self.find(MAKING)
        if making is None or making.writer is None:
            return None
        found = self.map(self.find, others)
        is_its_own = all(one is not None and one.writer == making.writer for one in found)
        return others if is_its_own else None

    def _others(self) -> list[str]:
        """Returns the keys of all objects but the lock and what a lock's probe may have left."""
        import obstore

        found = self.ask("list the store", lambda: obstore.list(self.client).collect())
        keys = [meta["path"] for meta in found if meta["path"] != DRIVER_LOCK]
        return [key for key in keys if passing_for(key.removeprefix(".looptap/")) != "driver.lock"]
