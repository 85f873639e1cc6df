"""Reading a store: every way gives what numpy has, and nothing that was not committed."""

import contextlib
import mmap
import multiprocessing
import os
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import xarray as xr
from hypothesis import strategies as st

from looptap.capture.store.keys import LEDGER
from looptap.capture.store.reading import decoded_arrays as library
from looptap.capture.store.reading import mapped_states as mapped
from looptap.capture.store.reading import memory_map as mapping
from looptap.capture.store.reading.decoded_arrays import LibraryArray
from looptap.capture.store.reading.mapped_states import MappedArray
from looptap.capture.store.reading.memory_map import Mapping
from looptap.capture.store.reading.reader import open_array, open_store
from looptap.capture.store.writing.commit import Store
from looptap.errors import MissingUnitsError, StoreError
from looptap.tests.s3_server import BUCKET, environment, serve_s3
from looptap.tests.state_stores import HIDDEN, as_float, commit_unit, make_states, whole_arrays

# rows of a unit and of a shard. 1: a row each; 7: odd, one chunk; 700: two shards of one chunk; 1536: three
# shards of one chunk; 2048: two shards of two chunks
SIZES = [(1, None), (7, None), (700, 350), (1536, 512), (2048, 1024)]
COMMITTED = [0, 2, 3]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def store(request, tmp_path_factory) -> Store:
    """Units 0, 2 and 3, ever fewer tokens in them; of unit 1 what a killed attempt left."""
    store = make_states(tmp_path_factory.mktemp("store") / "run.zarr", *request.param)
    for unit in range(4):
        commit_unit(store, unit)
    (store.path / LEDGER / "1.json").unlink()
    return store


@pytest.fixture(params=["mapped", "tensorstore", "zarr-python"])
def way(request, monkeypatch) -> str:
    """How states are read."""
    if request.param != "mapped":
        monkeypatch.setattr("looptap.capture.store.reading.reader.can_map", lambda metadata: False)
    if request.param == "zarr-python":
        monkeypatch.setattr(library, "_tensorstore", lambda: None)
    return request.param


def expected(store: Store, name: str, decode: bool = True) -> np.ndarray:
    values = whole_arrays(store, COMMITTED)[name]
    return as_float(values) if decode and values.dtype == np.uint16 else values


def axis_keys(length: int) -> st.SearchStrategy:
    """Whatever numpy takes for one axis; xarray misreads a backward slice that starts before it."""
    place = st.integers(-length, length - 1)
    end = st.none() | st.integers(-length - 2, length + 2)
    step = st.sampled_from([None, 1, 2, 3, -1, -2])
    return (
        place
        | st.builds(slice, st.none() | place, end, step)
        | st.lists(place, max_size=40).map(np.array).map(as_places)
    )


def as_places(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64)


def outer(array: np.ndarray, keys: tuple) -> np.ndarray:
    """numpy's answer to an outer indexer: one axis after the other, the last first."""
    for axis in reversed(range(len(keys))):
        array = array[(slice(None),) * axis + (keys[axis],)]
    return array


def test_each_way_is_the_way_it_says(store, way):
    for name, kind in [("state_all", MappedArray), ("state_packed", LibraryArray)]:
        array = open_array(store, name)
        assert isinstance(array, kind if way == "mapped" else LibraryArray)
    array.read(tuple(slice(0, 1) for _ in array.shape))
    module = "zarr" if way == "zarr-python" else "tensorstore"
    assert type(array._reader).__module__.split(".")[0] == module


def test_whole_arrays(store, way):
    dataset = open_store(store.path)
    for name in store.arrays:
        want = expected(store, name)
        assert dataset[name].dtype == want.dtype
        np.testing.assert_array_equal(dataset[name], want, err_msg=name)


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@pytest.mark.slow
def test_any_selection_equals_numpy(store, way, data):
    name = data.draw(st.sampled_from([*store.arrays]))
    decode = data.draw(st.booleans())
    want = expected(store, name, decode)
    keys = tuple(data.draw(axis_keys(length)) for length in want.shape)
    seen = open_store(store.path, decode=decode)[name].variable[keys].values
    want = outer(want, keys)
    assert seen.dtype == want.dtype
    np.testing.assert_array_equal(seen, want)


def test_points_equal_numpy(store, way):
    """Pairs of row and depth, not their product."""
    generator = np.random.default_rng(0)
    want = expected(store, "state_all")
    rows, depths = (xr.DataArray(generator.integers(0, n, 20), dims="pick") for n in want.shape[:2])
    seen = open_store(store.path)["state_all"][rows, depths]
    np.testing.assert_array_equal(seen, want[rows.values, depths.values])


def test_parts_of_rows_a_few_at_a_time(store, monkeypatch):
    monkeypatch.setattr(mapped, "_BLOCK_BYTES", 5 * HIDDEN * 2)
    want, dataset = expected(store, "state_all"), open_store(store.path)
    np.testing.assert_array_equal(dataset["state_all"][:, [2, 0], 3], want[:, [2, 0], 3])
    rows = np.random.default_rng(0).integers(0, len(want), 23)
    np.testing.assert_array_equal(dataset["state_all"][rows, 1, [4, 0, 4]], want[rows, 1][:, [4, 0, 4]])


def test_rows_of_many_regions(store, monkeypatch):
    """Only so many shards are mapped together, and only so many of those kept."""
    monkeypatch.setattr(mapped, "_REGION_SHARDS", 1)
    monkeypatch.setattr(mapped, "_MAX_REGIONS", 2)
    want, array = expected(store, "state_wide"), open_store(store.path)["state_wide"]
    rows = np.random.default_rng(0).integers(0, len(want), 300)
    for depth in (0, 2):
        np.testing.assert_array_equal(array[rows, depth], want[rows, depth])
        np.testing.assert_array_equal(array[:, depth], want[:, depth])
    source = array.variable._data.array._source
    assert len(source._regions) == 2


def open_files(path):
    """Files under ``path`` that this process has open.

    Others are not counted: the process may open some of its own meanwhile.
    """
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own is closed by now
            found.add(os.readlink(descriptor))
    return sorted(name for name in found if name.startswith(f"{path}/"))


def test_no_file_stays_open(store):
    with open(store.path / "zarr.json"):
        assert open_files(store.path) == [str(store.path / "zarr.json")]
    values = open_store(store.path)["state_all"]
    values.load()
    deadline_s = time.monotonic() + 10  # a library's own threads may be closing theirs
    while time.monotonic() < deadline_s and open_files(store.path):
        time.sleep(0.05)
    assert open_files(store.path) == []


def test_missing_units_are_refused_if_asked(store, way):
    dataset = open_store(store.path, missing="raise")
    C = store.plan.unit_tokens
    for name in store.arrays:
        rows = store.unit_rows(name)
        want = expected(store, name)
        np.testing.assert_array_equal(dataset[name][:rows], want[:rows])
        np.testing.assert_array_equal(dataset[name][[2 * rows, 0]], want[[2 * rows, 0]])
        for key in (slice(None), slice(rows, rows + 1), [0, rows], -3 * rows):
            with pytest.raises(MissingUnitsError, match=f"{name} of unit 1 is not committed"):
                dataset[name][key].load()
    with pytest.raises(LookupError):
        dataset.load()
    assert not dataset["sequence_length"][5:10].any() and dataset["sequence_length"][0] == C
    with pytest.raises(ValueError, match="missing is 'skip'"):
        open_store(store.path, missing="skip")


def test_several_missing_units_are_named(tmp_path):
    store = make_states(tmp_path / "run.zarr", 2, num_units=12)
    commit_unit(store, 1)
    with pytest.raises(MissingUnitsError, match="unit 0, 2, 3, 4, 5, 6, 7, 8 and 3 more is not committed"):
        open_store(store.path, missing="raise")["residual_norm"].load()


def test_a_unit_voided_later(tmp_path, way):
    """Its files go: who opened the store before is told, who opens it now sees nothing of it."""
    store = make_states(tmp_path / "run.zarr", 700, 350)
    for unit in range(4):
        commit_unit(store, unit)
    before = open_store(store.path)
    (store.path / LEDGER / "2.json").unlink()
    after = open_store(store.path)
    for name in ("state_all", "state_packed", "residual_norm", "lens_token"):
        values = after[name][1400:2100].values
        assert (values == -1).all() if name == "lens_token" else np.isnan(values).all()
        for key in store.shard_keys(name, 2):
            (store.path / key).unlink()
        with pytest.raises(StoreError, match=r"c\.(2|4)\S* cannot be read: it is missing.*looptap verify"):
            before[name][1400:2100].load()
        before[name][:1400].load()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: b"", "its index is not what was written"),
        (lambda data: data[:9], "its index is not what was written"),
        (lambda data: data[:-1], "its index is not what was written"),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "its index is not what was written"),
        (lambda data: data[2 * 350 * HIDDEN :], "chunks that it cannot hold"),  # the first chunk is cut off
        (lambda data: data + bytes(1 << 16), "more than can have been written"),
    ],
    ids=["empty", "cut short", "last byte", "flip", "first chunk", "longer"],
)
def test_damaged_shards_are_refused(tmp_path, damage, what):
    """Never a signal for reading past a file's end, never values of another place."""
    store = make_states(tmp_path / "run.zarr", 700, 350)
    for unit in range(4):
        commit_unit(store, unit)
    path = store.path / "state_all" / "c.1.0.0"
    path.write_bytes(damage(path.read_bytes()))
    state = open_store(store.path)["state_all"]
    for key in (slice(300, 400), [0, 360, 5]):
        with pytest.raises(StoreError, match=rf"state_all/c\.1\.0\.0 cannot be read: .*{what}"):
            state[key].load()
    np.testing.assert_array_equal(state[700:], as_float(whole_arrays(store, range(4))["state_all"][700:]))


@pytest.mark.parametrize("name", ["state_all", "state_packed"])
def test_shards_that_zarr_wrote(tmp_path, name, monkeypatch):
    """The index is read, not assumed: zarr-python puts chunks in another order, and none that is all fill."""
    import zarr

    store = make_states(tmp_path / "run.zarr", 2048, 1024)
    for unit in range(4):
        commit_unit(store, unit)
    values = np.asarray(store.group()[name][...])
    values[512:1024, 1] = 0x7FC0
    zarr.open_array(store.path / name, mode="r+")[:4000] = values[:4000]
    seen = open_store(store.path, decode=False)[name]
    np.testing.assert_array_equal(seen, values)
    rows = np.random.default_rng(0).integers(0, len(values), 500)
    np.testing.assert_array_equal(seen[rows, 1], values[rows, 1])


def test_threads_share_a_dataset(store):
    dataset = open_store(store.path)
    want = {name: expected(store, name) for name in ("state_all", "state_packed", "residual_norm")}

    def read(seed: int) -> None:
        generator = random.Random(seed)
        name = generator.choice([*want])
        rows = np.array(generator.choices(range(len(want[name])), k=50))
        np.testing.assert_array_equal(dataset[name][rows], want[name][rows])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(100)))


def test_dask_and_pickle(store):
    dataset = open_store(store.path)
    copy = pickle.loads(pickle.dumps(dataset))
    cuts = {"token": store.plan.unit_tokens, "depth_state": 1}  # chunk(token=) is something else
    chunked = open_store(store.path).chunk(cuts)
    for name in ("state_all", "state_packed", "residual_norm", "state"):
        read_before = dataset.chunk(cuts)[name].data.name
        np.testing.assert_array_equal(copy[name], dataset[name])
        np.testing.assert_array_equal(chunked[name].compute(), dataset[name])
        again = open_store(store.path).chunk(cuts)
        # so that equal graphs are shared
        assert again[name].data.name == chunked[name].data.name == read_before
        assert dataset.chunk(cuts)[name].data.name == read_before
        masked = open_store(store.path, missing="raise").chunk(cuts)
        assert masked[name].data.name != chunked[name].data.name
    assert chunked["state_all"].chunks[0] == (store.plan.unit_tokens,) * 4


def _read_in(dataset: xr.Dataset, names: tuple[str, ...]) -> list[np.ndarray]:
    return [dataset[name].values for name in names]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.slow
def test_processes_share_a_dataset(store, start):
    """tensorstore's threads do not survive a fork, so a child that waited for them would hang."""
    names = ("state_all", "state_packed", "residual_norm")
    dataset = open_store(store.path)
    here = _read_in(dataset, names)
    with multiprocessing.get_context(start).Pool(1) as pool:
        there = pool.apply_async(_read_in, (dataset, names)).get(timeout=120)
    for name, a, b in zip(names, here, there, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_pages_are_asked_for_where_some_are_missing(tmp_path, monkeypatch):
    """All that is wanted and little else; nothing where the pages tried are there."""
    asked: list[tuple[int, int]] = []
    resident = False
    monkeypatch.setattr(Mapping, "_advise", lambda self, start, stop: asked.append((start, stop)))
    monkeypatch.setattr(Mapping, "_is_resident", lambda self, offset: resident)
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    room = Mapping(1, 4 << 20, 96)
    room.add(0, path)
    starts = np.random.default_rng(0).integers(0, (4 << 20) // 96, 64) * 96
    room.will_need(starts, 96)
    assert all(any(a <= start and start + 96 <= b for a, b in asked) for start in starts.tolist())
    assert sum(b - a for a, b in asked) < 64 * (96 + mapping._SMALL_GAP_BYTES)
    asked.clear()
    room.will_need_run(960, 1 << 20)
    assert asked == [(960, 960 + (1 << 20))]
    resident = True
    asked.clear()
    room.will_need(starts, 96)
    room.will_need_run(960, 1 << 20)
    assert not asked


def test_what_is_in_memory_is_seen(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(bytes(64 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    room = Mapping(1, 64 << 20, 8)
    data = room.add(0, path)
    assert not room._is_resident(48 << 20)
    assert data[48 << 20] == 0
    assert room._is_resident((48 << 20) + 1) and room._is_resident(
        (48 << 20) // mmap.PAGESIZE * mmap.PAGESIZE
    )


@pytest.mark.slow
def test_reading_from_an_object_store(monkeypatch):
    with serve_s3() as door:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in environment(door).items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/reader/run.zarr"
        store = make_states(url, 700, 350)
        for unit in COMMITTED:
            commit_unit(store, unit)
        dataset = open_store(url)
        for name in store.arrays:
            want = expected(store, name)
            np.testing.assert_array_equal(dataset[name], want, err_msg=name)
            rows = [len(want) - 1, 0, 5]
            np.testing.assert_array_equal(dataset[name][rows], want[rows])
        copy = pickle.loads(pickle.dumps(dataset))
        np.testing.assert_array_equal(copy["state_all"][:, 1], expected(store, "state_all")[:, 1])
        with pytest.raises(MissingUnitsError):
            open_store(url, missing="raise")["state"].load()


def test_a_path_may_be_text(store):
    assert Path(str(store.path)) == store.path
    np.testing.assert_array_equal(open_store(str(store.path))["state"], expected(store, "state"))
