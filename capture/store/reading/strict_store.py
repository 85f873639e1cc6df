"""A store as Zarr libraries read it, in which a file that should be there and is not is no fill value."""

from collections.abc import Collection
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from ....errors import NoFileError, StoreDamagedError, StoreError, StoreUnreadableError
from ..places import disk
from ..places.directory import LocalPlace
from ..places.place import Place


class StrictStore(WrapperStore[Store]):
    """What zarr-python and xarray open to read arrays of which every file exists.

    Args:
        names: these arrays.
    """

    def __init__(self, place: Place, names: Collection[str]):
        self._place, self._names = place, frozenset(names)
        is_local = isinstance(place, LocalPlace)
        super().__init__(LocalStore(place.path, read_only=True) if is_local else place.zarr_store())

    def _with_store(self, store: Store) -> "StrictStore":
        return self  # read-only already, which is all that is asked of it

    def __getstate__(self) -> tuple[Place, frozenset[str]]:
        return self._place, self._names

    def __setstate__(self, state: tuple[Place, frozenset[str]]) -> None:
        self.__init__(*state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StrictStore) and other.__getstate__() == self.__getstate__()

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        name, _, file = key.partition("/")
        is_chunk = name in self._names and file.startswith("c.")
        if is_chunk and isinstance(self._place, LocalPlace):
            require_file(self._place, key)
        value = await super().get(key, prototype, byte_range)
        if value is None and is_chunk:
            raise lost(self._place, key)
        return value


def require_file(place: LocalPlace, key: str) -> None:
    """Makes sure that a file is there: no link, which may lead anywhere, and no pipe, which never ends.

    Raises:
        StoreError, NoFileError, StoreUnreadableError: it is not, or that cannot be said.
    """
    path = place.path / key
    try:
        disk.require_file(path)
    except NoFileError:
        raise
    except FileNotFoundError:
        raise lost(place, key) from None
    except OSError as error:
        raise StoreUnreadableError(f"{path} cannot be read: {error.strerror}") from error


def damaged(place: Any, name: str, error: Exception) -> StoreError:
    """Returns the error for bytes of an array that cannot be decoded."""
    return StoreDamagedError(
        f"{place}: {name} cannot be read, it is damaged ({error}); run `looptap verify {place}`"
    )


def lost(place: Any, key: str) -> StoreError:
    """Returns the error for a file of a committed unit, or of a coordinate, that is not there."""
    return StoreDamagedError(
        f"{place}/{key} cannot be read: it is missing, though it was written; run `looptap verify {place}`"
    )
