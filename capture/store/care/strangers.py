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
from .examined import Examined, Problem
from .retry import Patience


def look_around(found: Examined, patience: Patience) -> None:
    """Finds what is in the store's folders and is none of its files, or was left by a killed process."""
    store, done = found.store, set(found.done)
    folders = {".looptap", LEDGER, ATTEMPTS, STAGING, *store.metadata}
    files = {*store.layout.planned_keys(), *store.layout.chunk_keys("unit_done")}
    files |= {FILES, COMPLETE, SUMMARY, DRIVER_LOCK, GUARD}

    def is_known(key: str) -> bool:
        folder, _, name = key.rpartition("/")
        number = entry_unit(name) if folder == LEDGER else (attempt_of(name) or (None,))[0]
        if folder in (LEDGER, ATTEMPTS):
            return number is not None and number < store.num_units
        return key in files or store.unit_of(key) is not None

    for folder in ["", *sorted(folders)]:
        try:
            names = patience.ask(lambda folder=folder: store.place.names(folder))
            file_names = set(patience.ask(lambda folder=folder: store.place.file_names(folder)))
        except StoreUnreadableError as error:
            found.unread.append(Problem(None, folder or ".", str(error)))
            continue
        for name in sorted(names):
            key = f"{folder}/{name}".lstrip("/")
            if name not in file_names:
                attempt = attempt_of(name) if folder == STAGING else None
                if attempt is not None and attempt[0] < store.num_units:
                    found.drafts.append(key)
                elif key not in folders:
                    found.foreign.append(shown_name(key))
                continue
            of, unit = passing_for(name), store.unit_of(key)
            is_passing = key == MAKING or (of is not None and is_known(f"{folder}/{of}".lstrip("/")))
            if is_passing or (unit is not None and unit not in done):
                found.leftovers.append(key)
            elif not is_known(key) and not name.startswith(".nfs"):  # a deleted file that somebody has open
                found.foreign.append(shown_name(key))
