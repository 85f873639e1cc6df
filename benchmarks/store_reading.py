"""How fast states are read, beside mapping one plain tensor a depth and beside the libraries that read Zarr.

Physics: warm, the bytes are in the page cache, and a read is one copy into memory that has to be found. A map
of one tensor a depth does just that. A Zarr library reads a file into memory, decodes it into more memory and
copies from there, and always whole chunks: 64 random rows cost it 64 chunks of a mebibyte. Ours copies rows
from the map of the same Zarr files.

All hold the same bits of bfloat16, ours in shards of 256 MiB with chunks of 512 tokens of one depth. S7 and
the chunks of S9 are read by the reader below `looptap.open` and `looptap.batches`; on top of it xarray takes
about 0.2 ms a selection, which is a fifth of 8 MiB of rows, so `looptap.open` is printed too. Mixing is held
against the same mixing by hand. A sample is the mean of some selections where they are quick.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..capture.store.layout import ArraySpec, create_store
from ..capture.store.reading.batches import make_batches
from ..capture.store.reading.mapped_states import MappedArray
from ..capture.store.reading.reader import open_array, open_store
from ..capture.store.writing.attempt import begin_attempt
from ..capture.store.writing.commit import Store
from .bare_plan import bare_plan
from .bench_settings import StoreBench
from .goals import Figure
from .store_interop import count_readers
from .store_layout import measure_flatness, measure_opening

DEPTHS, WIDTH, UNIT_TOKENS = 32, 1024, 4096
_CHUNK_ROWS = 512
_UNIT_BYTES = DEPTHS * WIDTH * UNIT_TOKENS * 2
_RECEIPT = {"num_sequences": 1, "num_tokens": UNIT_TOKENS, "seconds": 0.0, "non_finite": {}}

Read = Callable[[np.random.Generator], Any]


@dataclass(frozen=True)
class Way:
    """One way to read, and how many selections it reads for one sample: slow ones need few."""

    read: Read
    times: int = 1


def measure(settings: StoreBench) -> list[Figure]:
    """S6 to S11 and S14."""
    with tempfile.TemporaryDirectory(dir=settings.directory) as folder, ExitStack() as stack:
        store = make_states(Path(folder) / "states.zarr", max(1, settings.megabytes * 2**20 // _UNIT_BYTES))
        flat = _write_flat(store, Path(folder))
        libraries, missing = _open_libraries(store, stack)
        readers = _Readers(store, flat, libraries)
        note = f"not installed: {', '.join(missing)}" if missing else ""
        figures = [
            _figure("S6", "one depth, all tokens / safetensors", 1.0, 5, readers.one_depth(), settings, note),
            _figure(
                "S7", "4096 random rows of a depth / mapped", 0.85, 1, readers.rows(4096), settings, note
            ),
            _figure("S8", "64 random rows / zarr-python's oindex", 20, 40, readers.rows(64), settings, note),
            _figure("S9", "shuffled chunks / mapped", 0.9, 1, readers.chunks(), settings, note),
            _figure(
                "S9 mixed", "batches / the same mixing by hand", 0.9, 1, readers.batches(), settings, note
            ),
        ]
        figures.append(measure_flatness(settings))
        figures.append(count_readers(Path(folder)))
        figures.append(measure_opening(settings, Path(folder)))
    return figures


def make_states(path: Path, num_units: int) -> Store:
    """A finished store of bfloat16 noise, the same in every unit."""
    num_tokens = num_units * UNIT_TOKENS
    plan = bare_plan(num_units, UNIT_TOKENS)
    shape = (num_tokens, DEPTHS, WIDTH)
    spec = ArraySpec(
        ("token", "depth_state", "hidden"), shape, UNIT_TOKENS, "uint16", {"bits_of": "bfloat16"}, "none"
    )
    coordinates = {
        "token_sequence": (("token",), np.arange(num_tokens, dtype=np.int32), {}),
        "state_depth": (("depth_state",), np.arange(DEPTHS, dtype=np.int32), {}),
    }
    create_store(path, plan=plan, coordinates=coordinates, arrays={"state": spec})
    store = Store.open(path)
    noise = np.random.default_rng(0).standard_normal((UNIT_TOKENS, DEPTHS, WIDTH), np.float32)
    bits = (noise.view(np.uint32) >> 16).astype(np.uint16)
    for unit in range(num_units):
        with begin_attempt(store, unit) as attempt:
            attempt.write("state", bits)
            attempt.commit(_RECEIPT)
    store.finish()
    return store


def _write_flat(store: Store, folder: Path) -> np.memmap:
    """The same states as one tensor a depth, mapped."""
    from safetensors.numpy import save_file

    state = store.group()["state"]
    assert isinstance(state, zarr.Array)
    depths = {str(depth): np.asarray(state[:, depth]) for depth in range(DEPTHS)}
    save_file(depths, folder / "flat.safetensors")
    with open(folder / "flat.bin", "wb") as file:
        for values in depths.values():
            file.write(values.data)
    return np.memmap(folder / "flat.bin", np.uint16, "r", shape=(DEPTHS, *depths["0"].shape))


def _open_libraries(store: Store, stack: ExitStack) -> tuple[dict[str, Any], list[str]]:
    """What takes an orthogonal index, by name; and who is missing."""
    path, missing = store.path / "state", []
    libraries: dict[str, Any] = {"zarr-python": zarr.open_array(path, mode="r").oindex}
    if importlib.util.find_spec("zarrs") is None:
        missing.append("zarrs")
    else:
        import zarrs  # noqa: F401

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            libraries["zarrs"] = zarr.open_array(path, mode="r").oindex
    if importlib.util.find_spec("tensorstore") is None:
        missing.append("tensorstore")
    else:
        import tensorstore

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        array = tensorstore.open(spec | {"recheck_cached_data": False}, read=True).result()
        libraries["tensorstore"] = _Waiting(array.oindex)
    return libraries, missing


class _Waiting:
    """tensorstore's index, whose result is there at once like others'."""

    def __init__(self, index: Any) -> None:
        self._index = index

    def __getitem__(self, key: Any) -> np.ndarray:
        return self._index[key].read().result()


class _Readers:
    """Every way to read, by goal; the first is ours, the second what it is held against."""

    def __init__(self, store: Store, flat: np.memmap, libraries: dict[str, Any]) -> None:
        self._store, self._flat, self._libraries = store, flat, libraries
        self._state = open_store(store.path, decode=False)["state"]
        array = open_array(store, "state")
        assert isinstance(array, MappedArray)
        self._array = array
        self._num_rows = self._flat.shape[1]
        for depth in range(
            DEPTHS
        ):  # the files were written past the page cache, and maps are made page by page
            self._state[:, depth].load()
            self._array.read((slice(0, self._num_rows), slice(depth, depth + 1), slice(0, WIDTH)))
            np.array(self._flat[depth])

    def one_depth(self) -> dict[str, Way]:
        from safetensors import safe_open

        file = safe_open(Path(str(self._flat.filename)).with_suffix(".safetensors"), "numpy")

        def depth(generator: np.random.Generator) -> int:
            return int(generator.integers(DEPTHS))

        ways = {
            "looptap.open": Way(lambda g: self._state[:, depth(g)].values, 4),
            "safetensors": Way(lambda g: file.get_tensor(str(depth(g))), 4),
            "mapped and copied": Way(lambda g: np.array(self._flat[depth(g)]), 4),
        }
        return ways | {name: Way(_one_depth_by(index)) for name, index in self._libraries.items()}

    def rows(self, num_rows: int) -> dict[str, Way]:
        def some(g: np.random.Generator) -> tuple[np.ndarray, int]:
            return g.integers(self._num_rows, size=num_rows), int(g.integers(DEPTHS))

        def mapped(g: np.random.Generator) -> np.ndarray:
            rows, depth = some(g)
            return self._flat[depth][rows]

        def ours(g: np.random.Generator) -> np.ndarray:
            rows, depth = some(g)
            return self._state[rows, depth].values

        def bare(g: np.random.Generator) -> np.ndarray:
            rows, depth = some(g)
            return self._array.read((rows, slice(depth, depth + 1), slice(0, WIDTH)))

        libraries = {name: Way(lambda g, i=index: i[some(g)]) for name, index in self._libraries.items()}
        named, plain = Way(ours, 16), Way(mapped, 16)
        if num_rows == 64:  # held against zarr-python
            return {"looptap.open": named, **libraries, "mapped": plain}
        return {"looptap": Way(bare, 16), "mapped": plain, "looptap.open": named, **libraries}

    def chunks(self) -> dict[str, Way]:
        def some(g: np.random.Generator, count: int) -> list[tuple[slice, int]]:
            starts = g.integers(self._num_rows // _CHUNK_ROWS, size=count) * _CHUNK_ROWS
            spans = [slice(int(start), int(start) + _CHUNK_ROWS) for start in starts]
            return list(zip(spans, g.integers(DEPTHS, size=count).tolist(), strict=True))

        def ours(g: np.random.Generator) -> None:
            for rows, depth in some(g, 128):
                out = np.empty((_CHUNK_ROWS, WIDTH), np.uint16)
                self._array.read_depth(rows, depth, out)

        def mapped(g: np.random.Generator) -> None:
            for rows, depth in some(g, 128):
                np.array(self._flat[depth, rows])

        def by(index: Any) -> Read:
            return lambda g: [index[key] for key in some(g, 128)]

        libraries = {name: Way(by(index)) for name, index in self._libraries.items()}
        return {"looptap": Way(ours), "mapped": Way(mapped), **libraries}

    def batches(self) -> dict[str, Way]:
        """One epoch of the whole store; each maps its files first."""
        size, buffer = 4096, 128

        def mapped() -> np.memmap:
            return np.memmap(str(self._flat.filename), np.uint16, "r", shape=self._flat.shape)

        def ours(g: np.random.Generator) -> None:
            for _ in make_batches(
                self._store.path,
                decode=False,  # bytes against bytes
                batch_rows=size,
                buffer_chunks=buffer,
                seed=int(g.integers(99)),
            ):
                pass

        def by_hand(g: np.random.Generator) -> None:
            flat = mapped()
            num_chunks = self._num_rows // _CHUNK_ROWS
            order, rows = (
                g.permutation(num_chunks * DEPTHS),
                np.empty((buffer * _CHUNK_ROWS, WIDTH), np.uint16),
            )
            for first in range(0, len(order), buffer):
                chunks = order[first : first + buffer]
                for place, chunk in enumerate(chunks.tolist()):
                    depth, start = chunk // num_chunks, chunk % num_chunks * _CHUNK_ROWS
                    here = slice(place * _CHUNK_ROWS, (place + 1) * _CHUNK_ROWS)
                    rows[here] = flat[depth, start : start + _CHUNK_ROWS]
                mixed = g.permutation(len(chunks) * _CHUNK_ROWS)
                for batch in range(0, len(mixed), size):
                    np.take(rows, mixed[batch : batch + size], axis=0)

        def unmixed(g: np.random.Generator) -> None:
            flat = mapped()
            num_chunks = self._num_rows // _CHUNK_ROWS
            for chunk in g.permutation(num_chunks * DEPTHS).tolist():
                depth, start = chunk // num_chunks, chunk % num_chunks * _CHUNK_ROWS
                np.array(flat[depth, start : start + _CHUNK_ROWS])

        return {"looptap": Way(ours), "mapped, mixed": Way(by_hand), "mapped, not mixed": Way(unmixed)}


def _one_depth_by(index: Any) -> Read:
    return lambda g: index[:, int(g.integers(DEPTHS))]


def _figure(
    name: str, what: str, must: float, stretch: float, ways: dict[str, Way], settings: StoreBench, note: str
) -> Figure:
    """Time of the second way over that of the first, and all others beside them."""
    # each reads rows of its own: what one has read, the next would find in the processor's cache
    rounds = [
        {label: _seconds(way, [seed, place]) for place, (label, way) in enumerate(ways.items())}
        for seed in range(settings.repeats + 1)
    ]
    del rounds[0]  # warms up
    ours, against, *_ = ways
    ratios = [one[against] / one[ours] for one in rounds]
    times = {label: statistics.median(one[label] for one in rounds) for label in ways}
    shown = ", ".join(f"{label} {seconds * 1e3:.3g}" for label, seconds in times.items())
    return Figure(
        name=name,
        what=what,
        seen=statistics.median(ratios),
        must=must,
        stretch=stretch,
        better="higher",
        detail=f"ms: {shown}; ratios {min(ratios):.2f} to {max(ratios):.2f}{'; ' + note if note else ''}",
    )


def _seconds(way: Way, seed: list[int]) -> float:
    generator = np.random.default_rng(seed)
    started_s = time.perf_counter()
    for _ in range(way.times):
        way.read(generator)
    return (time.perf_counter() - started_s) / way.times
