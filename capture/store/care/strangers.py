"""Finds what is in a store's folders and is none of its files, or was left by a killed process."""

from ....errors import StoreUnreadableError
from ..group import shown_name
from ..keys import (
    ATTEMPTS,
    COMPLETE,
    DRIVER_LOCK,
    FILES,
    GUARD,
    LEDGER,
    MAKING,
    STAGING,
    SUMMARY,
    attempt_of,
    entry_unit,
    passing_for,
)
from ..writing.commit import Store
from .examined import Examined, Problem
from .retry import Patience


class Names:
    """The names that a store's files and folders may have."""

    def __init__(self, store: Store):
        self._store = store
        self.folders = {".looptap", LEDGER, ATTEMPTS, STAGING, *store.metadata}
        self._files = {*store.layout.planned_keys(), *store.layout.chunk_keys("unit_done")}
        self._files |= {FILES, COMPLETE, SUMMARY, DRIVER_LOCK, GUARD}

    def is_file(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        if folder == LEDGER:
            return self._is_unit(entry_unit(name))
        if folder == ATTEMPTS:
            return self.is_attempt(name)
        return key in self._files or self._store.unit_of(key) is not None

    def is_attempt(self, name: str) -> bool:
        attempt = attempt_of(name)
        return attempt is not None and self._is_unit(attempt[0])

    def is_passing(self, key: str) -> bool:
        """Whether a file of this name is there for a moment while another one is written."""
        folder, slash, name = key.rpartition("/")
        of = passing_for(name)
        return key == MAKING or (of is not None and self.is_file(f"{folder}{slash}{of}"))

    def _is_unit(self, unit: int | None) -> bool:
        return unit is not None and unit < self._store.num_units


def passing_files(store: Store) -> list[str]:
    """Returns the keys of what is there for moments only; while nobody writes, killed processes left it.

    The folders of quantities have none: their files are linked from an attempt's.
    """
    names = Names(store)
    folders = ["", ".looptap", ATTEMPTS, *store.layout.coordinates]
    keys = [f"{folder}/{name}".lstrip("/") for folder in folders for name in store.place.file_names(folder)]
    return [key for key in keys if names.is_passing(key)]


def look_around(found: Examined, patience: Patience) -> None:
    """Finds what is in the store's folders and is none of its files, or was left by a killed process."""
    store, done, known = found.store, set(found.done), Names(found.store)
    for folder in ["", *sorted(known.folders)]:
        try:
            names = patience.ask(lambda folder=folder: store.place.names(folder))
            file_names = set(patience.ask(lambda folder=folder: store.place.file_names(folder)))
        except StoreUnreadableError as error:
            found.unread.append(Problem(None, folder or ".", str(error)))
            continue
        for name in sorted(names):
            key = f"{folder}/{name}".lstrip("/")
            unit = store.unit_of(key)
            if name not in file_names:
                if folder == STAGING and known.is_attempt(name):
                    found.drafts.append(key)
                elif key not in known.folders:
                    found.foreign.append(shown_name(key))
            elif known.is_passing(key) or (unit is not None and unit not in done):
                found.leftovers.append(key)
            elif not known.is_file(key) and not name.startswith(".nfs"):  # deleted, and open somewhere
                found.foreign.append(shown_name(key))
