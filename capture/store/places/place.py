"""The place of a store's bytes: what the protocol (`writing/`) needs of a directory or of an object store.

Keys are paths inside the store with slashes, such as `state/c.0.0.0` or `.looptap/ledger/7.json`.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

Bytes = bytes | bytearray | memoryview
Item = TypeVar("Item")
Result = TypeVar("Result")


class Sink(Protocol):
    """One file or object being written, at any offsets, by several threads."""

    def write_at(self, offset: int, data: Any) -> None: ...

    def close(self, num_bytes: int) -> None:
        """Completes the file, which is that long; holes in it are zeros."""
        ...

    def discard(self) -> None: ...


class Draft(Protocol):
    """The files of one attempt at a unit, until they have their final names."""

    def open_sink(self, key: str) -> Sink:
        """Starts a file that will be published as `key`."""
        ...

    def write(self, key: str, data: Bytes) -> None: ...

    def sync(self) -> None:
        """Waits until all that was written survives a crash."""
        ...

    def publish(self, key: str, fence: Callable[[], None]) -> None:
        """Gives a file its final name.

        Args:
            fence: asked before and, where it can be, after what another attempt left under the name is
                taken away; raises to stop that.
        Raises:
            FileExistsError: others keep publishing under this name.
        """
        ...

    def sync_published(self, keys: Iterable[str]) -> None:
        """Waits until these final names survive a crash."""
        ...

    def holds(self, key: str) -> bool:
        """Whether what has the final name now is this draft's file."""
        ...

    def withdraw(self, key: str) -> None:
        """Takes the final name back, if it is this draft's file that has it."""
        ...

    def discard(self) -> None:
        """Drops what was written; what was published stays."""
        ...


class Place(Protocol):
    """A store's place; str() gives its path or URL."""

    @property
    def address(self) -> str:
        """Path or URL that means the same in other processes, whatever folder they work in."""
        ...

    def names(self, folder: str) -> list[str]:
        """Returns the names that lie directly in a folder; none where there is no folder."""
        ...

    def file_names(self, folder: str) -> list[str]:
        """Returns the names of the files that lie directly in a folder: no folders, links or devices."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the bytes of the files that lie directly in a folder: no folders, links or devices."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is something of this name; "" asks for the place itself."""
        ...

    def refuse_links(self, folders: Iterable[str]) -> None:
        """Refuses a store of whose folders one is a symbolic link, which may lead anywhere.

        Raises:
            StoreError: names the link.
        """
        ...

    def read(self, key: str) -> bytes:
        """Reads a whole file. Raises FileNotFoundError."""
        ...

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        """Reads a range of a file, less where the file ends. Raises FileNotFoundError."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Makes a file, for good, unless there is one: raises FileExistsError."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Puts a whole file in place of whatever has this name, for good."""
        ...

    def remove(self, keys: Iterable[str]) -> None:
        """Removes files, for good; those that are gone already are no error."""
        ...

    def make(self, fill: Callable[[Path], None]) -> None:
        """Makes the store from what `fill` puts into an empty directory: wholly there or not at all.

        Raises:
            StoreExistsError: another process made one meanwhile.
        """
        ...

    def holds_leftovers_only(self) -> bool:
        """Whether all that is here was left by a killed `make`."""
        ...

    def begin(self, unit: int, number: int) -> Draft: ...

    def clean_draft(self, name: str, keys: Collection[str], put_back: Collection[str]) -> None:
        """Removes what a killed attempt left in its folder, as far as it was to become one of these keys.

        Args:
            name: the folder's, "unit.number".
            put_back: keys whose files go back where they were moved aside for it.
        """
        ...

    def restore_folders(self, folders: Iterable[str]) -> None:
        """Makes folders that are not there: copying a store may lose empty ones."""
        ...

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Applies a function that does little but ask this place, in the way that is quickest here."""
        ...

    def free_bytes(self) -> int | None:
        """Returns the bytes that are free; None where that cannot be known."""
        ...

    def full_disk_named(self, task: str, needed_bytes: int) -> AbstractContextManager[None]:
        """Reports that there is no room left as StoreFullError, and that writing is refused as
        StoreRefusedError; both say what was being written.
        """
        ...

    def zarr_store(self) -> Any:
        """Returns what zarr-python and xarray open to read the store."""
        ...
