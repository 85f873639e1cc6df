"""Where a store's bytes lie: what the protocol (`writing/`) needs of a directory or of an object store.

Keys are paths inside the store with slashes, such as `state/c.0.0.0` or `.looptap/ledger/7.json`.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    pass

Bytes = bytes | bytearray | memoryview
Item = TypeVar("Item")
Result = TypeVar("Result")


class Sink(Protocol):
    """One file or object being written, at any offsets, by several threads."""

    def write_at(self, offset: int, data: Any) -> None: ...

    def close(self, num_bytes: int) -> None:
        """All was written; the file is that long, and holes in it are zeros."""
        ...

    def discard(self) -> None: ...


class Draft(Protocol):
    """The files of one attempt at a unit, until they have their final names."""

    def open_sink(self, key: str) -> Sink:
        """Start a file that will be published as `key`."""
        ...

    def write(self, key: str, data: Bytes) -> None: ...

    def sync(self) -> None:
        """Wait until all that was written survives a crash."""
        ...

    def publish(self, key: str, fence: Callable[[], None]) -> None:
        """Give a file its final name.

        Args:
            fence: asked before and, where it can be, after what another attempt left under the name is
                taken away; raises to stop that.
        Raises:
            FileExistsError: others keep publishing under this name.
        """
        ...

    def sync_published(self, keys: Iterable[str]) -> None:
        """Wait until these final names survive a crash."""
        ...

    def holds(self, key: str) -> bool:
        """Whether what has the final name now is this draft's file."""
        ...

    def withdraw(self, key: str) -> None:
        """Take the final name back, if it is this draft's file that has it."""
        ...

    def discard(self) -> None:
        """Drop what was written; what was published stays."""
        ...


class Place(Protocol):
    """A store's place; str() gives its path or URL."""

    @property
    def address(self) -> str:
        """Path or URL that means the same in other processes, whatever folder they work in."""
        ...

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder; nothing where there is none."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the files that lie directly in a folder."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such a file; "" asks for the place itself."""
        ...

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        """Raises FileNotFoundError; fewer bytes where the file ends."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Make a file, for good, unless there is one: raises FileExistsError."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Put a whole file in place of whatever has this name, for good."""
        ...

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files, for good; those that are gone already are no error."""
        ...

    def make(self, fill: Callable[[Path], None]) -> None:
        """Make the store from what `fill` puts into an empty directory: wholly there or not at all.

        Raises:
            StoreExistsError: another process made one meanwhile.
        """
        ...

    def holds_leftovers_only(self) -> bool:
        """Whether all that is here was left by a killed `make`."""
        ...

    def begin(self, unit: int, number: int) -> Draft: ...

    def clean_drafts(self) -> None:
        """Drop what killed attempts left. While no worker runs."""
        ...

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Apply a function that asks little more than this place, as is quickest here."""
        ...

    def free_bytes(self) -> int | None:
        """Room that is left; None where nobody can know."""
        ...

    def full_disk_named(self, task: str, needed_bytes: int) -> AbstractContextManager[None]:
        """Reports that there is no room left as StoreFullError, which says what was being written."""
        ...

    def zarr_store(self) -> Any:
        """What zarr-python and xarray open to read it."""
        ...
