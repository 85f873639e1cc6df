"""Coordinates as a worker reads them: only if they are what was written when the store was made.

What a worker computes from a damaged `token_id` would be committed as sound. So each file is compared with
its checksum, once.
"""

import json
from typing import Any

import numpy as np

from ....errors import StoreDamagedError
from ..keys import FILES
from ..places.disk import file_record
from ..writing.commit import Store
from ..writing.encode import decode, file_shape


class Coordinates:
    """Reads rows of a store's coordinates; keeps the last file of each, so units in order read each once."""

    def __init__(self, store: Store):
        self._store = store
        self._records: dict[str, Any] | None = None
        self._last: dict[str, tuple[str, np.ndarray]] = {}

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows of a coordinate, all by default.

        Raises:
            StoreDamagedError: a file is not what was written.
        """
        metadata = self._store.metadata[name]
        end = metadata["shape"][0] if stop is None else stop
        file_rows, keys = file_shape(metadata)[0], self._store.layout.chunk_keys(name)
        parts = []
        for index in range(first // file_rows, -(-end // file_rows)):
            start = index * file_rows
            parts.append(self._file(name, keys[index])[max(0, first - start) : end - start])
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _file(self, name: str, key: str) -> np.ndarray:
        kept, values = self._last.get(name, ("", None))
        if kept == key and values is not None:
            return values
        try:
            content = self._store.place.read(key)
        except FileNotFoundError:
            raise self._damaged(f"{key} is missing") from None
        if file_record(content) != self._noted().get(key):
            raise self._damaged(f"{key} is not what was written when it was made")
        try:
            values = decode(self._store.metadata[name], content)
        except ValueError as error:
            raise self._damaged(f"{key}: {error}") from None
        self._last[name] = key, values
        return values

    def _noted(self) -> dict[str, Any]:
        if self._records is None:
            try:
                self._records = dict(json.loads(self._store.place.read(FILES)))
            except (ValueError, TypeError, FileNotFoundError) as error:
                raise self._damaged(f"{FILES} cannot be read ({error})") from None
        return self._records

    def _damaged(self, what: str) -> StoreDamagedError:
        return StoreDamagedError(
            f"{self._store} is damaged: {what}; the capture's own command, begun again, writes it as its "
            "data tell"
        )
