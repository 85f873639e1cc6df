"""Training batches: each captured state once an epoch, well mixed, and the same again on demand."""

import itertools
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from looptap.capture.store.keys import FILES
from looptap.capture.store.places.disk import file_record
from looptap.capture.store.reading import decoded_arrays as library
from looptap.capture.store.reading import mapped_states as mapped
from looptap.capture.store.reading.batches import make_batches
from looptap.capture.store.reading.reader import open_store
from looptap.capture.store.writing.commit import Store
from looptap.errors import StoreError
from looptap.tests.state_stores import (
    HIDDEN,
    STATE_DEPTHS,
    as_float,
    commit_unit,
    make_states,
    unit_values,
)

make_bits = partial(make_batches, decode=False)
COMMITTED = [0, 2, 3]


def fill(store: Store, units: list[int] = COMMITTED) -> Store:
    for unit in units:
        commit_unit(store, unit)
    return store


# chunks of 512 and 350 rows in several shards a unit; of 234 rows of chosen tokens; one chunk a unit
@pytest.fixture(
    params=[
        (2048, 1024, None, "none"),
        (700, 350, None, "lossless"),
        (702, None, 3, "none"),
        (5, None, 1, "none"),
        (1536, None, 3, "lossless"),
    ],
    ids=str,
    scope="module",
)
def store(request, tmp_path_factory) -> Store:
    unit_tokens, shard_rows, kept, codec = request.param
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    return fill(make_states(path, unit_tokens, shard_rows, kept=kept, codec=codec))


def rows_of(store: Store, places: list[int]) -> np.ndarray:
    """Every committed row of these depths' places, [rows, hidden], in an order of their own."""
    parts = [unit_values(store, unit)["state"][:, places].reshape(-1, HIDDEN) for unit in COMMITTED]
    return in_order(np.concatenate(parts))


def in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T[[0, 1, 2]])]


def together(batches) -> np.ndarray:
    return np.concatenate([np.empty((0, HIDDEN), np.uint16), *batches])


# a buffer of one chunk, of some, of all; batches of one row, of a few, larger than the store
@pytest.mark.parametrize(("batch_rows", "buffer_chunks"), [(1, 3), (7, 1), (33, 2), (512, 5), (100_000, 256)])
def test_every_row_once(store, batch_rows, buffer_chunks):
    want = rows_of(store, [0, 1, 2])
    batches = make_bits(store.path, batch_rows=batch_rows, buffer_chunks=buffer_chunks, seed=3)
    seen = list(batches)
    assert [len(batch) for batch in seen[:-1]] == [batch_rows] * (len(batches) - 1)
    assert len(seen) == len(batches) and batches.num_rows == len(want)
    assert all(batch.dtype == np.uint16 and batch.flags.owndata for batch in seen)
    np.testing.assert_array_equal(in_order(together(seen)), want)


@pytest.mark.parametrize("num_ranks", [2, 3, 50])
def test_ranks_share_an_epoch(store, num_ranks):
    """More ranks than chunks leave some with nothing, which is no error."""
    parts = [
        list(make_bits(store.path, batch_rows=40, buffer_chunks=2, rank=rank, num_ranks=num_ranks))
        for rank in range(num_ranks)
    ]
    np.testing.assert_array_equal(in_order(together(itertools.chain(*parts))), rows_of(store, [0, 1, 2]))


def test_the_same_again(store):
    def read(**order) -> np.ndarray:
        return together(make_bits(store.path, batch_rows=16, buffer_chunks=3, **order))

    batches = make_bits(store.path, batch_rows=16, buffer_chunks=3, seed=1)
    first = together(batches)
    np.testing.assert_array_equal(together(batches), first)
    np.testing.assert_array_equal(read(seed=1), first)
    assert not np.array_equal(read(seed=2), first)
    assert not np.array_equal(read(seed=1, epoch=1), first)
    np.testing.assert_array_equal(in_order(read(seed=1, epoch=1)), in_order(first))


@pytest.mark.parametrize("rank", [0, 1])
def test_going_on_where_it_stopped(store, rank):
    order = dict(batch_rows=16, buffer_chunks=3, seed=5, rank=rank, num_ranks=2)
    whole = list(make_bits(store.path, **order))
    for start in {0, 1, 2, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 3}:
        rest = make_bits(store.path, start=start, **order)
        assert len(rest) == len(whole[start:])
        np.testing.assert_array_equal(together(rest), together(whole[start:]))


def test_rows_are_mixed(tmp_path):
    """Each batch holds about as much of every chunk in the buffer, in no order."""
    store = fill(make_states(tmp_path / "run.zarr", 4096, kept=None, num_units=1), [0])
    batches = list(make_bits(store.path, depths=[4], batch_rows=256, seed=0))
    row = [batch[:, 0].astype(int) + 1000 * batch[:, 1].astype(int) for batch in batches]
    assert len(batches) == 16
    for rows in row:
        # 8 chunks, 32 rows of each expected, give or take 5; the bounds are six times that
        counts = np.bincount(rows // 512, minlength=8)
        assert counts.min() > 2 and counts.max() < 64
        assert abs(np.corrcoef(rows, np.arange(256))[0, 1]) < 0.4
    assert abs(np.corrcoef(np.concatenate(row), np.arange(4096))[0, 1]) < 0.1


def test_chunks_come_in_random_order(tmp_path):
    """They do so even if the buffer holds one: a long epoch does not drift through the store."""
    store = fill(make_states(tmp_path / "run.zarr", 4096, kept=None, num_units=1), [0])
    batches = make_bits(store.path, batch_rows=512, buffer_chunks=1, seed=0)
    chunks = [(int(b[0, 0]) + 1000 * int(b[0, 1])) // 512 + 8 * int(b[0, 2]) for b in batches]
    assert sorted(chunks) == list(range(24)) and abs(np.corrcoef(chunks, range(24))[0, 1]) < 0.5


def test_chosen_depths(store):
    np.testing.assert_array_equal(
        in_order(together(make_bits(store.path, depths=[7, 1, 7]))), rows_of(store, [0, 2])
    )
    np.testing.assert_array_equal(
        in_order(together(make_bits(store.path, depths=[STATE_DEPTHS[1]]))), rows_of(store, [1])
    )


def test_bfloat16_as_float32(store):
    bits = list(make_bits(store.path, batch_rows=30, seed=2))
    for seen, want in zip(make_batches(store.path, batch_rows=30, seed=2), bits, strict=True):
        assert seen.dtype == np.float32
        np.testing.assert_array_equal(seen, as_float(want))


@pytest.mark.parametrize("has_tensorstore", [True, False])
def test_compressed_states(tmp_path, has_tensorstore, monkeypatch):
    """The same batches as from bare ones."""
    if not has_tensorstore:
        monkeypatch.setattr(library, "_tensorstore", lambda: None)
    options = dict(batch_rows=100, buffer_chunks=4, seed=9)
    bare = fill(make_states(tmp_path / "bare.zarr", 2048, 1024, kept=None))
    packed = fill(make_states(tmp_path / "packed.zarr", 2048, 1024, kept=None, codec="lossless"))
    for a, b in zip(make_bits(bare.path, **options), make_bits(packed.path, **options), strict=True):
        np.testing.assert_array_equal(a, b)


def note_again(path: Path, key: str) -> None:
    """Notes the checksum of a file as if it had been written so when the store was made."""
    files = json.loads((path / FILES).read_bytes())
    files[key] = file_record((path / key).read_bytes())
    (path / FILES).write_text(json.dumps(files))


def test_tokens_that_are_not_the_first_of_their_chunk(tmp_path):
    """Empty slots may lie anywhere."""
    store = fill(make_states(tmp_path / "run.zarr", 1024, kept=None))
    owner = zarr.open_array(store.path / "token_sequence", mode="r+")
    values = np.asarray(owner[...])
    values[np.random.default_rng(0).random(len(values)) < 0.3] = -1
    values[512:700] = -1
    owner[...] = values
    note_again(store.path, "token_sequence/c.0")
    want = open_store(store.path, decode=False)["state"].values[values >= 0]
    committed = np.isin(np.flatnonzero(values >= 0) // 1024, COMMITTED)
    seen = together(make_bits(store.path, batch_rows=64))
    np.testing.assert_array_equal(in_order(seen), in_order(want[committed].reshape(-1, HIDDEN)))


def test_workers_of_a_data_loader(store):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            for rows in make_bits(store.path, batch_rows=50, rank=worker.id, num_ranks=worker.num_workers):
                yield torch.from_numpy(rows).view(torch.bfloat16)

    loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2)
    seen = [rows.view(torch.uint16).numpy() for rows in loader]
    np.testing.assert_array_equal(in_order(together(seen)), rows_of(store, [0, 1, 2]))


def test_who_stops_early_leaves_no_thread(tmp_path):
    store = fill(make_states(tmp_path / "run.zarr", 700, 350, kept=None, codec="lossless"))

    def readers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("looptap-batches")]

    batches = iter(make_bits(store.path, batch_rows=1, buffer_chunks=1))
    next(batches)
    assert len(readers()) == 1
    batches.close()
    assert not readers()


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_missing_file_is_told(tmp_path, codec):
    store = fill(make_states(tmp_path / "run.zarr", 700, 350, kept=None, codec=codec))
    batches = make_bits(store.path, buffer_chunks=1)
    (store.path / "state" / "c.1.0.0").unlink()
    with pytest.raises(StoreError, match=r"state/c\.1\.0\.0 cannot be read: it is missing"):
        list(batches)


def test_rows_of_many_regions(store, monkeypatch):
    options = dict(batch_rows=64, buffer_chunks=6, seed=4)
    want = together(make_bits(store.path, **options))
    monkeypatch.setattr(mapped, "_REGION_SHARDS", 1)
    np.testing.assert_array_equal(together(make_bits(store.path, **options)), want)


def test_chunks_are_asked_for_ahead(tmp_path, monkeypatch):
    """Each once, no later than the batch before the one that first needs it."""
    store = fill(make_states(tmp_path / "run.zarr", 2048, 1024, kept=None))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        mapped.MappedArray, "will_need", lambda self, rows, depth: asked.append((rows.start // 512, depth))
    )
    for batch in make_bits(store.path, batch_rows=100, buffer_chunks=3):
        row = batch[:, 0].astype(int) + 1000 * batch[:, 1].astype(int)
        assert set(zip((row // 512).tolist(), batch[:, 2].tolist(), strict=True)) <= set(asked)
    assert len(set(asked)) == len(asked) == 3 * (4 + 2 + 1)


def test_what_cannot_be_had(tmp_path, store):
    with pytest.raises(ValueError, match=r"no state of depth 2, 99 is kept .*: choose from 1, 4, 7"):
        make_bits(store.path, depths=[1, 2, 99])
    for name, value in [
        ("batch_rows", 0),
        ("buffer_chunks", 0),
        ("num_ranks", 0),
        ("start", -1),
        ("seed", -1),
    ]:
        with pytest.raises(ValueError, match=f"{name} is {value}: give at least"):
            make_bits(store.path, **{name: value})
    with pytest.raises(ValueError, match="rank is 2: 2 ranks are counted from 0"):
        make_bits(store.path, rank=2, num_ranks=2)
    empty = make_states(tmp_path / "run.zarr", 5)
    with pytest.raises(ValueError, match="holds no state of a committed unit yet"):
        make_bits(empty.path)
