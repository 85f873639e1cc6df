"""The writers that `store_writing.py` compares: the disk alone, ours, and the libraries.

Each makes what it needs in a folder and returns a function that writes all of the source and syncs it.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..capture.store.layout import ArraySpec, Codec, create_store
from ..capture.store.places.aligned import page_aligned
from ..capture.store.places.disk import sync_tree
from ..capture.store.writing.attempt import begin_attempt
from ..capture.store.writing.commit import Store
from ..capture.store.writing.ring import Ring
from ..capture.store.writing.shard import buffer_bytes
from .bare_plan import bare_plan

DEPTHS, WIDTH = 32, 1024
_CHUNK_ROWS = 512
_ROW_BYTES = DEPTHS * WIDTH * 2
_RING_BUFFERS = 16  # of 4 MiB
_BLOCK_BYTES = 8 << 20

Write = Callable[[], None]


@dataclass(frozen=True)
class Source:
    """The data to write: bfloat16 noise, one shard of it, which every shard of the unit gets again."""

    token_major: np.ndarray  # uint16 [rows, depth, width]
    depth_major: np.ndarray  # the same values, uint16 [depth, rows, width]
    num_shards: int

    @property
    def num_bytes(self) -> int:
        return self.num_shards * self.token_major.nbytes


def make_source(megabytes: int) -> Source:
    """Shards of 256 MiB, or one smaller shard if fewer bytes are wanted."""
    rows = max(_CHUNK_ROWS, min(4096, (megabytes << 20) // _ROW_BYTES // _CHUNK_ROWS * _CHUNK_ROWS))
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((_CHUNK_ROWS, DEPTHS, WIDTH), np.float32)
    part = (noise.view(np.uint32) >> 16).astype(np.uint16)
    token_major = page_aligned(rows * _ROW_BYTES).view(np.uint16).reshape(rows, DEPTHS, WIDTH)
    depth_major = page_aligned(rows * _ROW_BYTES).view(np.uint16).reshape(DEPTHS, rows, WIDTH)
    for start in range(0, rows, _CHUNK_ROWS):
        token_major[start : start + _CHUNK_ROWS] = part
        depth_major[:, start : start + _CHUNK_ROWS] = part.transpose(1, 0, 2)
    return Source(token_major, depth_major, max(1, round((megabytes << 20) / token_major.nbytes)))


def make_writers() -> tuple[dict[str, Callable[[Path, Source], Write]], list[str]]:
    """Makes writers, in the order in which they take turns; returns also the libraries that are missing."""
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
    create_store(folder / "run.zarr", plan=bare_plan(1), coordinates={}, arrays={"state": spec})
    store = Store.open(folder / "run.zarr")
    ring = Ring(_RING_BUFFERS, buffer_bytes(store.arrays["state"]))
    parts = source.depth_major.reshape(DEPTHS, -1).view(np.uint8).reshape(DEPTHS, -1, ring.num_bytes)
    buffers = [ring.take() for _ in range(_RING_BUFFERS)]
    for buffer in buffers:
        buffer[:] = parts[0, 0]
        ring.give(buffer)

    def write() -> None:
        with begin_attempt(store, 0) as attempt:
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
            str(folder / "zarr.zarr"),
            shape=(k * rows, DEPTHS, WIDTH),
            dtype="uint16",
            fill_value=32704,
            chunks=(_CHUNK_ROWS, 1, WIDTH),
            shards=(rows, DEPTHS, WIDTH),
            compressors=None,
        )

    def write() -> None:
        with zarr.config.set(config):
            for i in range(k):
                array[i * rows : (i + 1) * rows] = source.token_major
        sync_tree(folder / "zarr.zarr")

    return write
