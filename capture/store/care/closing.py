"""Checks what closes a store against the ledger, and against what was noted of it."""

import io
import json
from typing import Any

import numpy as np

from ....errors import NoFileError, StoreUnreadableError
from ..keys import COMPLETE, SUMMARY
from ..places.disk import file_record
from ..writing.commit import Store, summary_rows
from ..writing.encode import decode
from .examined import Examined, Problem
from .retry import Patience


def check_closing(found: Examined, patience: Patience) -> None:
    """Checks what `Store.finish` wrote, against the ledger and against what it noted of it."""
    store, done = found.store, found.done
    is_whole = len(done) == store.num_units
    try:
        noted = patience.read(store.place, COMPLETE)
        marks = {key: patience.read(store.place, key) for key in store.layout.chunk_keys("unit_done")}
        if noted is None:
            if is_whole and store.place.exists(SUMMARY):
                found.problems.append(Problem(None, COMPLETE, "is missing, and every unit is there"))
            for key, content in marks.items():
                if content is not None and (what := _undecodable(store, content)):
                    found.problems.append(Problem(None, key, what))
            return
        summary = patience.read(store.place, SUMMARY)
    except (StoreUnreadableError, NoFileError) as error:
        where = found.blocked if isinstance(error, NoFileError) else found.unread
        where.append(Problem(None, "what closes the store", str(error)))
        return
    if not is_whole:
        what = f"says that the store is complete, the ledger has {len(done)} of {store.num_units} units"
        found.problems.append(Problem(None, COMPLETE, what))
        return
    records = _closing_records(store, noted)
    if records is None:
        found.problems.append(Problem(None, COMPLETE, "is not what was written"))
    for key, content in marks.items():
        if what := _wrong_marks(store, content, (records or {}).get(key)):
            found.problems.append(Problem(None, key, what))
    is_ledger_sound = all(problem.unit is None for problem in (*found.problems, *found.unread))
    if is_ledger_sound and (what := _wrong_summary(store, summary, (records or {}).get(SUMMARY))):
        found.problems.append(Problem(None, SUMMARY, what))


def _closing_records(store: Store, noted: bytes) -> dict[str, Any] | None:
    """Returns what `complete` notes of the files that close a store; None if it is damaged."""
    if not noted and not store.metadata["unit_done"]["codecs"][-1].get("configuration", {}).get("checksum"):
        return {}  # as looptap 0.1 wrote it
    try:
        records = json.loads(noted)
        return records if set(records) == {SUMMARY, *store.layout.chunk_keys("unit_done")} else None
    except (ValueError, TypeError, RecursionError):
        return None


def _wrong_marks(store: Store, content: bytes | None, record: dict[str, Any] | None) -> str | None:
    if content is None:
        return "is missing"
    if record is not None and record != file_record(content):
        return "is not what was written"
    if what := _undecodable(store, content):
        return what
    marks = decode(store.metadata["unit_done"], content)
    return None if marks.all() else f"marks {np.count_nonzero(marks)} units, the ledger has all"


def _undecodable(store: Store, content: bytes) -> str | None:
    try:
        decode(store.metadata["unit_done"], content)
    except ValueError as error:
        return f"is damaged: {error}"
    return None


def _wrong_summary(store: Store, content: bytes | None, record: dict[str, Any] | None) -> str | None:
    if content is None:
        return "is missing"
    if record is not None:
        return None if record == file_record(content) else "is not what was written"
    import pyarrow as pa
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"cannot be read ({error})"
    return None if rows == list(summary_rows(store.entries())) else "says something else than the ledger"
