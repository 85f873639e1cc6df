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

import mmap
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr

from ..capture.store.commit import Store
from ..capture.store.disk import sync_tree
from ..capture.store.layout import ArraySpec, Codec, create_store
from ..capture.store.ring import Ring, page_aligned
from ..capture.store.shard import buffer_bytes
from .goals import Figure

if TYPE_CHECKING:
    from .store import StoreBench

DEPTHS, WIDTH = 32, 1024
_CHUNK_ROWS = 512
_ROW_BYTES = DEPTHS * WIDTH * 2
_RING_BUFFERS = 16  # of 4 MiB
_BLOCK_BYTES = 8 << 20

Write = Callable[[], None]


@dataclass(frozen=True)
class Source:
    """What is written: bfloat16 noise, one shard of it, which every shard of the unit gets again."""

    token_major: np.ndarray  # uint16 [rows, depth, width]
    depth_major: np.ndarray  # the same values, uint16 [depth, rows, width]
    num_shards: int

    @property
    def num_bytes(self) -> int:
        return self.num_shards * self.token_major.nbytes


@dataclass(frozen=True)
class Timing:
    """One write."""

    seconds: float
    cpu_seconds: float


def measure(settings: "StoreBench") -> list[Figure]:
    """S1 to S5."""
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder:
        source = make_source(settings.megabytes)
        writers, missing = _writers()
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


def make_source(megabytes: int) -> Source:
    """Shards of 256 MiB, or one smaller shard if fewer bytes are wanted."""
    rows = max(_CHUNK_ROWS, min(4096, megabytes * 10**6 // _ROW_BYTES // _CHUNK_ROWS * _CHUNK_ROWS))
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((_CHUNK_ROWS, DEPTHS, WIDTH), np.float32)
    part = (noise.view(np.uint32) >> 16).astype(np.uint16)
    token_major = page_aligned(rows * _ROW_BYTES).view(np.uint16).reshape(rows, DEPTHS, WIDTH)
    depth_major = page_aligned(rows * _ROW_BYTES).view(np.uint16).reshape(DEPTHS, rows, WIDTH)
    for start in range(0, rows, _CHUNK_ROWS):
        token_major[start : start + _CHUNK_ROWS] = part
        depth_major[:, start : start + _CHUNK_ROWS] = part.transpose(1, 0, 2)
    return Source(token_major, depth_major, max(1, round(megabytes * 10**6 / token_major.nbytes)))


def _writers() -> tuple[dict[str, Callable[[Path, Source], Write]], list[str]]:
    """In the order in which they take turns; and libraries that are not installed."""
    writers = {
        "raw": _raw,
        "ours": lambda folder, source: _ours(folder, source, "none"),
        "raw again": _raw,
        "raw, 4 KiB pages": lambda folder, source: _raw(folder, source, small_pages=True),
        "ours copying": lambda folder, source: _ours(folder, source, "none", copies=True),
        "ours lossless": lambda folder, source: _ours(folder, source, "lossless", copies=True),
    }
    missing = []
    try:
        import tensorstore  # noqa: F401

        writers |= {
            "tensorstore lossless": lambda folder, source: _tensorstore(folder, source, codec="lossless"),
            "tensorstore direct": lambda folder, source: _tensorstore(folder, source, io_mode="direct"),
            "tensorstore": lambda folder, source: _tensorstore(folder, source),
            "tensorstore transposing": lambda folder, source: _tensorstore(folder, source, transposes=True),
        }
    except ImportError:
        missing.append("tensorstore")
    writers["zarr-python"] = lambda folder, source: _zarr(folder, source, {})
    try:
        import zarrs  # noqa: F401

        pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
        writers["zarrs"] = lambda folder, source: _zarr(folder, source, pipeline)
    except ImportError:
        missing.append("zarrs")
    return writers, missing


def _raw(folder: Path, source: Source, *, small_pages: bool = False) -> Write:
    memory = mmap.mmap(-1, source.token_major.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE if small_pages else mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, np.uint16)[:] = source.token_major.reshape(-1)

    def write() -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            descriptor = os.open(folder / "raw", flags | os.O_DIRECT, 0o644)
        except OSError:  # a file system without: then it is the page cache for all
            descriptor = os.open(folder / "raw", flags, 0o644)
        view = memoryview(memory)
        for _ in range(source.num_shards):
            for start in range(0, len(view), _BLOCK_BYTES):
                os.write(descriptor, view[start : start + _BLOCK_BYTES])
        os.fsync(descriptor)
        os.close(descriptor)

    return write


def _ours(folder: Path, source: Source, codec: Codec, *, copies: bool = False) -> Write:
    shard_rows, k = len(source.token_major), source.num_shards
    axes, shape = ("token", "depth_state", "hidden"), (k * shard_rows, DEPTHS, WIDTH)
    spec = ArraySpec(axes, shape, shape[0], "uint16", {"bits_of": "bfloat16"}, codec, shard_rows)
    create_store(folder / "run.zarr", plan={"num_units": 1}, coordinates={}, arrays={"state": spec})
    store = Store.open(folder / "run.zarr")
    ring = Ring(_RING_BUFFERS, buffer_bytes(store.arrays["state"]))
    parts = source.depth_major.reshape(DEPTHS, -1).view(np.uint8).reshape(DEPTHS, -1, ring.num_bytes)
    buffers = [ring.take() for _ in range(_RING_BUFFERS)]
    for buffer in buffers:
        buffer[:] = parts[0, 0]
        ring.give(buffer)

    def write() -> None:
        with store.begin(0) as attempt:
            writer = attempt.open_writer("state", ring=ring)
            for place in range(k * parts.shape[1]):
                for depth in range(DEPTHS):
                    buffer = writer.take()
                    if copies:
                        buffer[:] = parts[depth, place % parts.shape[1]]
                    writer.put(place, depth, buffer, writer.buffer_rows)
            attempt.commit({"num_sequences": 1, "num_tokens": shape[0], "seconds": 0.0, "non_finite": {}})

    return write


def _tensorstore(
    folder: Path,
    source: Source,
    *,
    io_mode: str = "memory_map",
    transposes: bool = False,
    codec: Codec = "none",
) -> Write:
    """An array in depth order, so that there is nothing to transpose, unless that is asked for."""
    import tensorstore

    rows, k = len(source.token_major), source.num_shards
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}]
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": 2, "blocksize": 0}
    inner += [{"name": "blosc", "configuration": blosc}] if codec == "lossless" else []
    values = source.token_major if transposes else source.depth_major

    def order(rows: int, depths: int) -> list[int]:
        return [rows, depths, WIDTH] if transposes else [depths, rows, WIDTH]

    sharding = {
        "chunk_shape": order(_CHUNK_ROWS, 1),
        "codecs": inner,
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    array = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/tensorstore.zarr"},
            "metadata": {
                "shape": order(k * rows, DEPTHS),
                "data_type": "uint16",
                "fill_value": 32704,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": order(rows, DEPTHS)}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
            "context": {"file_io_mode": {"mode": "direct"}} if io_mode == "direct" else {},
            "create": True,
        }
    ).result()

    def write() -> None:  # synced before it answers: the driver's default
        for i in range(k):
            here = slice(i * rows, (i + 1) * rows)
            target = array[here] if transposes else array[:, here]
            target.write(values, can_reference_source_data_indefinitely=True).result()

    return write


def _zarr(folder: Path, source: Source, config: dict[str, Any]) -> Write:
    rows, k = len(source.token_major), source.num_shards
    with zarr.config.set(config):
        array = zarr.create_array(
            str(folder / "zarr.zarr"), shape=(k * rows, DEPTHS, WIDTH), dtype="uint16", fill_value=32704,
            chunks=(_CHUNK_ROWS, 1, WIDTH), shards=(rows, DEPTHS, WIDTH), compressors=None,
        )  # fmt: skip

    def write() -> None:
        with zarr.config.set(config):
            for i in range(k):
                array[i * rows : (i + 1) * rows] = source.token_major
        sync_tree(folder / "zarr.zarr")

    return write


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
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_memory_here, (name, root, megabytes))


def _extra_memory_here(name: str, root: Path, megabytes: int) -> float:
    source, (writers, _) = make_source(megabytes), _writers()
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
        """In each round, MB/s or as a ratio."""
        if of is None:
            return [num_bytes / 1e6 / timings[name].seconds for timings in rounds]
        return [timings[of].seconds / timings[name].seconds for timings in rounds]

    def cpu(name: str) -> float:
        return statistics.median(timings[name].cpu_seconds for timings in rounds) / (num_bytes / 1e9)

    def said(name: str) -> str:
        return f"{name} {statistics.median(speed(name)):,.0f} MB/s, {cpu(name):.2f} CPU s/GB"

    for timings in rounds:  # the mean of what the disk gave just before and just after
        both = Timing(*((getattr(timings["raw"], f) + getattr(timings["raw again"], f)) / 2 for f in
                        ("seconds", "cpu_seconds")))  # fmt: skip
        timings["raw"] = both
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    of_raw = speed("ours", "raw")
    yield Figure(
        name="S1", what="uncompressed states, synced and committed, to raw", better="higher",
        seen=statistics.median(of_raw), must=0.85, stretch=0.95,
        detail=f"{min(of_raw):.2f} to {max(of_raw):.2f} in {len(of_raw)} rounds; {said('raw')}; "
        f"{said('ours')}; {said('ours copying')}",
    )  # fmt: skip
    yield Figure(
        name="S2", what="its CPU seconds per GB, to raw from 4 KiB pages", better="lower",
        seen=cpu("ours") / cpu("raw, 4 KiB pages"), must=4, stretch=2,
        detail=f"{cpu('ours'):.3f} / {cpu('raw, 4 KiB pages'):.3f}, and raw from 2 MiB pages "
        f"{cpu('raw'):.3f}; checksums alone {_checksum_cpu():.3f}; copying {cpu('ours copying'):.3f}",
    )  # fmt: skip
    others = "; ".join(f"{name} {value:,.1f}" for name, value in extra_mb.items() if name != "ours")
    yield Figure(
        name="S3", what="its memory beyond the ring, MB", better="lower",
        seen=extra_mb["ours"], must=64, stretch=4, detail=others,
    )  # fmt: skip
    libraries = ("tensorstore direct", "tensorstore", "tensorstore transposing", "zarr-python", "zarrs")
    here = [name for name in libraries if name in rounds[0]]
    yield Figure(
        name="S4", what="to tensorstore with direct I/O and a source in chunk order", better="higher",
        seen=statistics.median(speed("ours", "tensorstore direct")) if "tensorstore" not in missing else None,
        must=1.5, stretch=1.9,
        detail="; ".join(f"to {n} {statistics.median(speed('ours', n)):.1f}x" for n in here)
        + "; " + "; ".join(said(name) for name in here) + absent,
    )  # fmt: skip
    yield Figure(
        name="S5", what="lossless (blosc lz4 bitshuffle), to tensorstore, same codec", better="higher",
        seen=statistics.median(speed("ours lossless", "tensorstore lossless")) if "tensorstore" not in missing
        else None, must=1.0, stretch=1.2,
        detail="; ".join(said(n) for n in ("ours lossless", "tensorstore lossless") if n in rounds[0])
        + absent,
    )  # fmt: skip
