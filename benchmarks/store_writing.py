"""How fast states reach the disk, beside the disk itself and beside the libraries that write Zarr shards.

Physics: bytes have to cross from memory to the disk once. `raw` does just that: one thread writes the same
bytes in blocks of 8 MiB with O_DIRECT, then fsync. Every Zarr library first turns token-major values over to
chunk order in a second copy of the shard, and most go through the page cache, a third; these copies and the
pages they touch are what it costs, not the format. Our writer is handed chunks as a model leaves them.

Ours is one unit through the whole protocol: attempt, shards, fsync, links, ledger entry. Its ring is filled
before the clock starts, as a GPU's copy engine fills it; "copying" has the processor fill it. All writers
take turns within each round, and ratios are of one round: the speed of a shared disk changes by the minute.

Memory in 2 MiB pages, which raw and ours both get where the system gives them, makes O_DIRECT nearly free of
processor time; what is left of ours is checksums. Processor time is held against raw from 4 KiB pages, which
is what memory usually has, and the other is printed beside it.
"""

import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from .bench_settings import StoreBench
from .goals import Figure
from .store_writers import Source, Write, make_source, make_writers


@dataclass(frozen=True)
class Timing:
    """One write."""

    seconds: float
    cpu_seconds: float


def measure(settings: StoreBench) -> list[Figure]:
    """S1 to S5."""
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
        source = make_source(settings.megabytes)
        writers, missing = make_writers()
        rounds = [
            {name: _time(make, Path(folder), source) for name, make in writers.items()}
            for _ in range(settings.repeats + 1)
        ][1:]  # the first one warms up
        extra_mb = {
            name: _extra_memory(name, Path(folder), min(settings.megabytes, 512))
            for name in ("ours", "ours lossless", "tensorstore direct", "zarr-python")
            if name in writers
        }
    return list(_figures(rounds, extra_mb, source.num_bytes, missing))


def _time(make: Callable[[Path, Source], Write], root: Path, source: Source) -> Timing:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        write = make(Path(folder), source)
        started_s, cpu_s = time.perf_counter(), time.process_time()
        write()
        timing = Timing(time.perf_counter() - started_s, time.process_time() - cpu_s)
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # so that what is left to do for one writer is not done during the next
        Path(folder).mkdir()
    return timing


def _extra_memory(name: str, root: Path, megabytes: int) -> float:
    """Peak memory of a write beyond what was there before it, MB, in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_extra_memory_here, name, root, megabytes).result()


def _extra_memory_here(name: str, root: Path, megabytes: int) -> float:
    source, (writers, _) = make_source(megabytes), make_writers()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        write = writers[name](Path(folder), source)
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is now
        write()
        return (_status_bytes("VmHWM") - before) / 1e6


def _checksum_cpu() -> float:
    """CPU seconds for the crc32c of 1 GB that is in no cache."""
    data = np.zeros(256 << 20, np.uint8)
    data[:] = 1
    data.flags.writeable = False
    started_s = time.process_time()
    google_crc32c.value(data)
    return (time.process_time() - started_s) / (data.nbytes / 1e9)


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _figures(
    rounds: list[dict[str, Timing]], extra_mb: dict[str, float], num_bytes: int, missing: list[str]
) -> Iterator[Figure]:
    def speed(name: str, of: str | None = None) -> list[float]:
        """Returns the speed of each round, MB/s or as a ratio."""
        if of is None:
            return [num_bytes / 1e6 / timings[name].seconds for timings in rounds]
        return [timings[of].seconds / timings[name].seconds for timings in rounds]

    def cpu(name: str) -> float:
        return statistics.median(timings[name].cpu_seconds for timings in rounds) / (num_bytes / 1e9)

    def said(name: str) -> str:
        return f"{name} {statistics.median(speed(name)):,.0f} MB/s, {cpu(name):.2f} CPU s/GB"

    for timings in rounds:  # the mean of what the disk gave just before and just after
        both = Timing(
            *(
                (getattr(timings["raw"], f) + getattr(timings["raw again"], f)) / 2
                for f in ("seconds", "cpu_seconds")
            )
        )
        timings["raw"] = both
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    of_raw = speed("ours", "raw")
    yield Figure(
        name="S1",
        what="uncompressed states, synced and committed, to raw",
        better="higher",
        seen=statistics.median(of_raw),
        must=0.85,
        stretch=0.95,
        detail=f"{min(of_raw):.2f} to {max(of_raw):.2f} in {len(of_raw)} rounds; {said('raw')}; "
        f"{said('ours')}; {said('ours copying')}",
    )
    yield Figure(
        name="S2",
        what="its CPU seconds per GB, to raw from 4 KiB pages",
        better="lower",
        seen=cpu("ours") / cpu("raw, 4 KiB pages"),
        must=4,
        stretch=2,
        detail=f"{cpu('ours'):.3f} / {cpu('raw, 4 KiB pages'):.3f}, and raw from 2 MiB pages "
        f"{cpu('raw'):.3f}; checksums alone {_checksum_cpu():.3f}; copying {cpu('ours copying'):.3f}",
    )
    others = "; ".join(f"{name} {value:,.1f}" for name, value in extra_mb.items() if name != "ours")
    yield Figure(
        name="S3",
        what="its memory beyond the ring, MB",
        better="lower",
        seen=extra_mb["ours"],
        must=64,
        stretch=4,
        detail=others,
    )
    libraries = ("tensorstore direct", "tensorstore", "tensorstore transposing", "zarr-python", "zarrs")
    to_each = {n: statistics.median(speed("ours", n)) for n in libraries if n in rounds[0]}
    quickest = min(to_each, key=to_each.__getitem__)
    yield Figure(
        name="S4", what=f"to the quickest library here, {quickest}", better="higher",
        seen=to_each[quickest] if "tensorstore" in to_each else None, must=1.5, stretch=1.9,
        detail="; ".join(f"to {name} {ratio:.1f}x" for name, ratio in to_each.items())
        + "; " + "; ".join(map(said, to_each)) + absent,
    )  # fmt: skip
    yield Figure(
        name="S5",
        what="lossless (blosc lz4 bitshuffle), to tensorstore, same codec",
        better="higher",
        seen=statistics.median(speed("ours lossless", "tensorstore lossless"))
        if "tensorstore" not in missing
        else None,
        must=1.0,
        stretch=1.2,
        detail="; ".join(said(n) for n in ("ours lossless", "tensorstore lossless") if n in rounds[0])
        + absent,
    )
