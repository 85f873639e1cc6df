"""The time and memory of analysing a store, each work in a process of its own.

Reading is the floor: every byte comes from the page cache, is decompressed (statistics are zstd), and is
copied into memory one unit at a time. The analysis walks the same units with every measure and every answer
at work; what it adds are reductions over arrays that are in memory, and a class for each token's path. Its
memory is a unit of what shares quantities, read ahead once, whatever the store's size.

Both are processes of their own that take turns, so that imports, threads and the page cache are alike, and
each says its own peak memory: what it holds for itself, looked at every few milliseconds. Pages of mapped
states are the page cache's, which the kernel takes back when it needs them; with them it is the peak that
the kernel counts, printed beside it. The store is given, or it is made: a planned capture whose units are
filled with numbers that behave like a loop's (steps that shrink, cosines that come nearer) without running a
model.
"""

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..capture.store.quantities import QUANTITIES
from .bench_settings import AnalysisBench
from .goals import Figure

if TYPE_CHECKING:
    from ..capture.store.writing.attempt import begin_attempt
    from ..capture.store.writing.commit import Store

_PROBE = 256  # sequences of the plan that tells what one takes


@dataclass(frozen=True)
class Run:
    """One process that went over the store."""

    seconds: float
    own_bytes: int
    """Most bytes held, with the data of the interpreter and its libraries, without pages of files."""
    resident_bytes: int
    """Most resident bytes, with pages of mapped files."""


def measure(settings: AnalysisBench) -> list[Figure]:
    """Time, memory, and memory of the report."""
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
        path = settings.store or make_store(Path(folder) / "made.zarr", settings)
        return compare(path, settings.repeats)


def compare(path: Path, repeats: int) -> list[Figure]:
    """The figures of a store at `path`."""
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    runs: dict[str, list[Run]] = {"read": [], "analyse": [], "report": []}
    in_fresh_process(_read, path)  # from here on the files are in the page cache, if they fit
    for _ in range(repeats):
        for name, work in (("read", _read), ("analyse", _analyse)):
            runs[name].append(in_fresh_process(work, path))
    runs["report"].append(in_fresh_process(_report, path))
    ratios = [a.seconds / b.seconds for a, b in zip(runs["analyse"], runs["read"], strict=True)]
    seconds = {name: statistics.median(run.seconds for run in each) for name, each in runs.items()}
    own = {name: max(run.own_bytes for run in each) / 1e9 for name, each in runs.items()}
    resident = {name: max(run.resident_bytes for run in each) / 1e9 for name, each in runs.items()}
    size = f"{num_bytes / 1e9:.2f} GB of files"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {repeats} rounds"
    return [
        Figure(
            name="time", what="all measures and answers / reading every array once",
            seen=statistics.median(ratios), must=2.0, better="lower",
            detail=f"{size}; reading {seconds['read']:.1f} s, analysis {seconds['analyse']:.1f} s; {spread}",
        ),
        Figure(
            name="memory", what="peak memory of the analysis, GB", seen=own["analyse"], must=1.0,
            better="lower", detail=f"{size}; with pages of mapped files {resident['analyse']:.2f} GB",
        ),
        Figure(
            name="report", what="peak memory of writing the report, GB", seen=own["report"], must=1.0,
            better="lower", detail=f"{size}; with pages of mapped files {resident['report']:.2f} GB; "
            f"{seconds['report']:.1f} s, analysis included",
        ),
    ]  # fmt: skip


def in_fresh_process(work: Callable[[Path], None], path: Path) -> Run:
    """Runs `work` in a process of its own that has loaded nothing of ours."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_timed, (work, path))


def _timed(work: Callable[[Path], None], path: Path) -> Run:
    from ..analysis import findings  # noqa: F401  # imports are no part of what is compared

    with ThreadPoolExecutor(1) as watcher:
        ended = threading.Event()
        held = watcher.submit(_most_held, ended)
        started_s = time.perf_counter()
        work(path)
        seconds = time.perf_counter() - started_s
        ended.set()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Run(seconds, held.result(), int(status["VmHWM"].split()[0]) * 1024)


def _most_held(ended: threading.Event) -> int:
    """Bytes that this process holds at most until then, pages of files left out."""
    most, page = 0, os.sysconf("SC_PAGESIZE")
    while not ended.wait(0.005):
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        most = max(most, (resident - of_files) * page)
    return most


def _read(path: Path) -> None:
    from ..capture.store.reading.reader import iter_units

    for unit in iter_units(path):
        assert unit.nbytes


def _analyse(path: Path) -> None:
    from ..analysis.findings import find

    find([path])


def _report(path: Path) -> None:
    from ..analysis.pages.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        write_report([path], Path(folder) / "report.html")


def make_store(path: Path, settings: AnalysisBench) -> Path:
    """A finished store of about so many bytes, of sequences of 40 to 199 tokens, without running a model."""
    from ..capture.plan import make_plan
    from ..capture.plan_cost import disk_bytes
    from ..capture.run import prepare_store
    from ..capture.settings import CaptureSettings

    data, rng = path.with_suffix(".safetensors"), np.random.default_rng(0)
    wanted = CaptureSettings.of(
        model=settings.model,
        data=data,
        store=path,
        quantities=settings.quantities,
        states=settings.states,
    )
    _write_data(data, _PROBE)
    of_the_probe = disk_bytes(make_plan(wanted))
    _write_data(data, max(1, round(_PROBE * settings.gigabytes * 1e9 / of_the_probe)))
    store = prepare_store(make_plan(wanted))
    planned = xr.open_zarr(path, chunks=None)
    for unit in range(store.num_units):
        _fill(store, unit, planned, rng)
    store.finish()
    return path


def _write_data(path: Path, num_sequences: int) -> None:
    from safetensors.numpy import save_file

    length_S = np.random.default_rng(1).integers(40, 200, num_sequences, dtype=np.int64)
    save_file({"input_ids": np.ones((num_sequences, 200), np.int64), "lengths": length_S}, path)


def _fill(store: "Store", unit: int, planned: xr.Dataset, rng: np.random.Generator) -> None:
    """Commits a unit's arrays, each with rows up to the last used slot, as a capture writes them."""
    sizes = {axis: store.plan.unit_rows(axis) for axis in ("token", "sequence")}
    part = planned.isel({axis: slice(unit * size, (unit + 1) * size) for axis, size in sizes.items()})
    used = {
        "token": int((part["token_sequence"].values >= 0).sum()),
        "sequence": int((part["sequence_length"].values > 0).sum()),
    }
    recurrence_D = planned["recurrence"].values.astype(np.float32)
    with begin_attempt(store, unit) as attempt:
        for name, array in store.arrays.items():
            axes = QUANTITIES[name].axes
            shape = (used[axes[0]], *array["shape"][1:])
            attempt.write(name, _values(name, shape, recurrence_D, rng))
        attempt.commit(
            {"num_sequences": used["sequence"], "num_tokens": used["token"], "seconds": 0.0, "non_finite": {}}
        )


def _values(
    name: str, shape: tuple[int, ...], recurrence_D: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Numbers between 0 and 1; where recurrences count, of a loop that comes to rest, but for noise."""
    about = QUANTITIES[name]
    if name == "state":
        return rng.standard_normal(shape, np.float32)
    if about.dtype == "int32":
        return rng.integers(0, 256, shape, dtype=np.int32)
    value = rng.random(shape, dtype=np.float32)
    if about.axes[1] != "depth" or about.first_recurrence < 0:
        return value
    place = [np.newaxis, slice(None), *[np.newaxis] * (len(shape) - 2)]
    left = np.float32(0.8) ** recurrence_D[tuple(place)]
    value = 1 - left * value if name.endswith("cosine") else left * value
    due_D = recurrence_D >= about.first_recurrence
    return np.where(due_D[tuple(place)], value, np.float32(np.nan))
