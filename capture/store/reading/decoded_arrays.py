"""Stored arrays that cannot be mapped, read by a Zarr library: compressed ones, and those in object stores.

On a local disk that is tensorstore where it is installed, which decodes in several threads, else zarr-python.
An object store is read by zarr-python through the connection that the rest of looptap uses.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import StorePath

from ..places.directory import LocalPlace
from ..places.place import Place
from .mapped_states import Key
from .strict_store import StrictStore, damaged, require_file

_was_forked = False


class LibraryArray:
    """A stored array, opened when it is first read.

    Args:
        directory: the store's; None in an object store.
        metadata: the array's zarr.json.
    """

    def __init__(self, place: Place, directory: Path | None, name: str, metadata: dict[str, Any]) -> None:
        self._place, self._directory, self._name, self._metadata = place, directory, name, metadata
        self.shape: tuple[int, ...] = tuple(metadata["shape"])
        self.dtype = np.dtype(metadata["data_type"])
        self._file_rows: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._reader: Any = None
        self._pid = 0

    def __getstate__(self) -> dict[str, Any]:
        # alike before and after reading, as dask names arrays by this
        return self.__dict__ | {"_reader": None, "_pid": 0}

    def read(self, key: Key) -> np.ndarray:
        """Reads values at the outer product of the axes' keys.

        Raises:
            StoreError: a file that should be there is missing, for which libraries would read fill values,
                or is damaged.
        """
        if self._directory is not None:
            self._require_files(key[0])
        try:
            if self._reader is None or self._pid != os.getpid():
                self._reader, self._pid = self._open(), os.getpid()
            values = self._reader.oindex[key]
            return np.asarray(values if isinstance(values, np.ndarray) else values.read().result())
        except (RuntimeError, ValueError) as error:  # what codecs say of bytes that are none of theirs
            raise damaged(self._place, self._name, error) from error

    def _open(self) -> Any:
        """Opens it by its metadata in the group, which were checked, and not by its own `zarr.json`."""
        if self._directory is not None and (tensorstore := _tensorstore()) is not None:
            files = {"driver": "file", "path": f"{self._directory / self._name}/"}
            spec = {"driver": "zarr3", "kvstore": files, "metadata": self._metadata, "assume_metadata": True}
            return tensorstore.open(spec, read=True, open=True).result()
        path = StorePath(StrictStore(self._place, [self._name]), self._name)
        return zarr.Array.from_dict(path, self._metadata)

    def _require_files(self, rows: slice | np.ndarray) -> None:
        if isinstance(rows, slice):
            numbers = range(rows.start // self._file_rows, -(-rows.stop // self._file_rows))
        else:
            numbers = np.unique(rows // self._file_rows).tolist()
        assert isinstance(self._place, LocalPlace)
        for number in numbers:
            require_file(self._place, f"{self._name}/c.{number}{'.0' * (len(self.shape) - 1)}")


def _tensorstore() -> Any:
    """Returns the module tensorstore; None if it is not installed, or its threads are a parent process's."""
    try:
        import tensorstore
    except ImportError:
        return None
    return None if _was_forked else tensorstore


def _note_fork() -> None:
    global _was_forked
    _was_forked = "tensorstore" in sys.modules


os.register_at_fork(after_in_child=_note_fork)
