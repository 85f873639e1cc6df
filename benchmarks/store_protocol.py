"""S13 and S15: what resuming and committing cost.

S13 is what a driver does before the first unit of a capture that was begun: list the ledger of 100,000 units
and take them from the plan. Nothing is parsed, so the cost is that of one directory listing; reading every
entry, which is what resuming must not do, is timed beside it on part of them.

S15 is one unit of 20 statistics of 2 MB, from arrays in memory to the ledger entry, as a worker does it; and
the same with every wait for the disk left out, which is what a store that may lose units in a power cut would
cost. Waits are few, as all files of a unit are waited for together: its files, then the directories that
they were published in, then the entry and its directory. Beside it the wait alone, of 20 files that are
written and synced by nothing but the system's calls: the roof. The two take turns, and the median of a
round's ratios counts.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from ..capture.store.care.repair import clean
from ..capture.store.keys import entry_key
from ..capture.store.layout import ArraySpec, create_store
from ..capture.store.ledger_entry import entry_checksum
from ..capture.store.places import disk
from ..capture.store.writing.attempt import begin_attempt
from ..capture.store.writing.commit import Store
from .bare_plan import bare_plan
from .bench_settings import StoreBench
from .goals import Figure

NUM_UNITS = 100_000
NUM_READ = 2_000
NUM_ARRAYS, ARRAY_BYTES = 20, 2_000_000
_RECEIPT = {"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}}


def measure(settings: StoreBench) -> list[Figure]:
    """The figures of this part."""
    with tempfile.TemporaryDirectory(dir=settings.directory, prefix="looptap-bench-") as folder:
        return [
            _measure_resume(Path(folder) / "many.zarr", settings.repeats),
            _measure_commit(Path(folder) / "commits", settings.repeats),
        ]


def _measure_resume(path: Path, repeats: int) -> Figure:
    store = _make_store(path, 1, NUM_UNITS, rows=1)
    with begin_attempt(store, 0) as attempt:
        attempt.write("q0", np.zeros((1, 1), np.float32))
        entry = attempt.commit(_RECEIPT)
    for unit in range(1, NUM_UNITS):  # one is left to do
        if unit != NUM_UNITS // 2:
            (path / entry_key(unit)).write_text(json.dumps(_entry_of(store, unit, entry)))
            (path / f".looptap/attempts/{unit}.1").touch()
    todo, resume, parse = [], [], []
    for _ in range(repeats):
        seconds, units = _timed(store.todo)
        assert units == [NUM_UNITS // 2]
        todo.append(seconds)
        resume.append(seconds + _timed(lambda: clean(store))[0])
        parse.append(_timed(lambda: [store.entry(unit) for unit in range(1, NUM_READ)])[0])
    parsed_s = statistics.median(parse) * NUM_UNITS / NUM_READ
    return Figure(
        name="S13",
        what="finding what is to do among 100,000 units, s",
        seen=statistics.median(todo),
        must=0.5,
        stretch=0.1,
        better="lower",
        detail=f"with the look for attempts after a commit {statistics.median(resume):.2f} s; reading every "
        f"entry would take {parsed_s:.1f} s (from {NUM_READ:,} of them)",
    )


def _entry_of(store: Store, unit: int, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns another unit's entry as that unit's, as sound as its own would be."""
    (shard,) = entry["shards"]["q0"]
    shards = {"q0": [{**shard, "file": key} for key in store.shard_keys("q0", unit)]}
    other = {**entry, "unit": unit, "shards": shards}
    return other | {"checksum": entry_checksum(other)}


def _measure_commit(folder: Path, repeats: int) -> Figure:
    rows = ARRAY_BYTES // 4 // 50
    store = _make_store(folder / "run.zarr", NUM_ARRAYS, 2 * (3 * repeats + 1), rows)
    generator = np.random.default_rng(0)
    values = [generator.standard_normal((rows, 50), np.float32) for _ in range(NUM_ARRAYS)]
    units = iter(range(store.num_units))

    def commit() -> None:
        with begin_attempt(store, next(units)) as attempt:
            for index, array in enumerate(values):
                attempt.write(f"q{index}", array)
            attempt.commit(_RECEIPT)

    def commit_without_waiting() -> None:
        with patch.object(disk, "sync", list):
            commit()

    def write_and_wait() -> None:
        folder.joinpath("raw").mkdir(exist_ok=True)
        paths = [folder / "raw" / f"{time.monotonic_ns()}.{index}" for index in range(NUM_ARRAYS)]
        for path, array in zip(paths, values, strict=True):
            path.write_bytes(array.data)
        disk.sync(paths)

    def in_turn() -> list[float]:
        seconds = []
        for step in (commit, commit_without_waiting, write_and_wait):
            seconds.append(_timed(step)[0])
            disk.sync_tree(folder)  # or the next one waits for this one's bytes
        return seconds

    in_turn()
    times = [in_turn() for _ in range(3 * repeats)]
    durable, not_durable, raw = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    return Figure(
        name="S15",
        what="commit of 20 arrays x 2 MB, durable / not durable",
        seen=statistics.median(durable_s / other_s for durable_s, other_s, _ in times),
        must=1.5,
        stretch=1.2,
        better="lower",
        detail=f"{durable:.0f} / {not_durable:.0f} ms, compression included; the same 20 arrays written bare "
        f"and synced {raw:.0f} ms",
    )


def _make_store(path: Path, num_arrays: int, num_units: int, rows: int) -> Store:
    width = 50 if rows > 1 else 1
    arrays = {
        f"q{index}": ArraySpec(("token", "depth"), (num_units * rows, width), rows, "float32", {})
        for index in range(num_arrays)
    }
    create_store(path, plan=bare_plan(num_units), coordinates={}, arrays=arrays)
    return Store.open(path)


def _timed(step: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.perf_counter()
    result = step()
    return time.perf_counter() - started_s, result
