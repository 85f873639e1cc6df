"""A store in an object store that speaks S3.

Objects appear whole or not at all, so nothing is staged: an attempt holds its shards in memory and puts them
at commit, each on condition that the name is free. Where another attempt left something, it is replaced on
condition that it is still that: no object is deleted to make room, so none that is wanted can be.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ....errors import StoreExistsError
from ..keys import DRIVER_LOCK
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
            if self.exists("zarr.json"):
                raise StoreExistsError(f"{self.url} was made by another process just now: open it")
            self.remove(self._leftovers())
            files = {
                str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()
            }
            last = files.pop("zarr.json")
            try:
                self.map(lambda key: self.create(key, files[key].read_bytes()), files)
                lock.check()
                self.create("zarr.json", last.read_bytes())  # from now on there is a store
            except FileExistsError as error:
                raise StoreExistsError(
                    f"{self.url} is being made by another process: open it then"
                ) from error

    def holds_leftovers_only(self) -> bool:
        return not self.exists("zarr.json") and self.exists(DRIVER_LOCK)

    def begin(self, unit: int, number: int) -> ObjectDraft:
        return ObjectDraft(self, f"{unit}.{number}.{make_token()}")

    def clean_drafts(self) -> None:
        pass  # what was killed took its memory with it

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

    def _leftovers(self) -> list[str]:
        import obstore

        found = self.ask("list the store", lambda: obstore.list(self.client).collect())
        return [meta["path"] for meta in found if meta["path"] != DRIVER_LOCK]
