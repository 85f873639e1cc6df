"""The store against plain zarr-python and xarray: they read what was written, and NaN where nothing was."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.store.care.status import StoreStatus, store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import LEDGER, STAGING
from looptap.capture.store.layout import (
    BFLOAT16_NAN,
    ArraySpec,
    create_store,
    inner_rows,
    store_exists,
)
from looptap.capture.store.places.lock import driver_lock
from looptap.capture.store.plan import StoredSettings, plan_differences
from looptap.capture.store.quantities import QUANTITIES, resolve_quantities
from looptap.capture.store.reading.reader import iter_units, open_store
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.errors import StoreError, StoreExistsError, StoreMissingError

DEPTHS, HEADS, HIDDEN, SEQUENCES = (
    5,
    3,
    6,
    4,
)  # all different, so that no two axes can be taken for each other


def make_store(path: Path, unit_tokens: int, num_units: int = 3) -> Store:
    """A store with every kind of array: compressed 2-d and 3-d, uncompressed bfloat16 bits and float32."""
    U, C, rows = num_units, unit_tokens, state_rows(unit_tokens)
    settings = StoredSettings(quantities=("residual_norm", "state"), dtype="float32", device="cpu")
    plan = bare_plan(U, C, SEQUENCES, num_state_rows=rows, settings=settings, versions={"looptap": "0"})
    along = {"token": U * C, "sequence": U * SEQUENCES, "depth": DEPTHS}
    coordinates = {
        name: ((axis,), np.arange(along[axis], dtype=dtype) + 1, {"long_name": name})
        for name, axis, dtype in [
            ("depth", "depth", np.int32),
            ("stage", "depth", np.int8),
            ("token_id", "token", np.int32),
            ("token_sequence", "token", np.int32),
            ("sequence_length", "sequence", np.int32),
            ("sequence_id", "sequence", np.int64),
        ]
    }
    arrays = {
        "residual_norm": ArraySpec(("token", "depth"), (U * C, DEPTHS), C, "float32", {"units": "1"}),
        "attention_entropy": ArraySpec(("token", "depth", "head"), (U * C, DEPTHS, HEADS), C, "float32", {}),
        "state": ArraySpec(
            ("token_state", "depth_state", "hidden"),
            (U * rows, 2, HIDDEN),
            rows,
            "uint16",
            {"bits_of": "bfloat16"},
            "none",
        ),
        "state_wide": ArraySpec(
            ("token", "depth_state", "hidden"), (U * C, 2, HIDDEN), C, "float32", {}, "none"
        ),
        # two files a unit where that goes
        "state_split": ArraySpec(
            ("token", "depth_state", "hidden"),
            (U * C, 2, HIDDEN),
            C,
            "float32",
            {},
            "lossless",
            C if C % 2 else C // 2,
        ),
    }
    create_store(path, plan=plan, coordinates=coordinates, arrays=arrays)
    return Store.open(path)


def state_rows(unit_tokens: int) -> int:
    return max(1, unit_tokens // 3)


def unit_values(store: Store, unit: int) -> dict[str, np.ndarray]:
    """What a unit holds: random, with a ragged tail that differs from unit to unit."""
    generator = np.random.default_rng(unit)
    values = {}
    for name, array in store.arrays.items():
        rows = max(1, store.unit_rows(name) - 7 * unit)
        values[name] = generator.standard_normal((rows, *array["shape"][1:])).astype(np.float32)
    values["state"] = (values["state"].view(np.uint32) >> 16).astype(np.uint16)
    return values


def all_keys(store: Store, unit: int) -> list[str]:
    return [key for name in store.arrays for key in store.shard_keys(name, unit)]


def run_unit(store: Store, unit: int) -> dict:
    with begin_attempt(store, unit) as attempt:
        for name, rows in unit_values(store, unit).items():
            attempt.write(name, rows)
        return attempt.commit(
            {"num_sequences": 2, "num_tokens": 10, "seconds": 0.5, "non_finite": {"state": unit}}
        )


def stream_states(store: Store, unit: int) -> None:
    """Hands states over as a worker does, chunk by chunk; errors of a writing thread come up in this one."""
    with begin_attempt(store, unit) as attempt:
        writer = attempt.open_writer("state_wide")
        for depth in range(writer.num_depths):
            for place in range(store.unit_rows("state_wide") // writer.buffer_rows):
                writer.put(place, depth, writer.take(), writer.buffer_rows)
        writer.close()


def expected(store: Store, units: list[int]) -> dict[str, np.ndarray]:
    """The whole arrays, by numpy alone."""
    whole = {}
    for name, array in store.arrays.items():
        rows = store.unit_rows(name)
        fill = BFLOAT16_NAN if name == "state" else np.nan
        whole[name] = np.full(array["shape"], fill, array["data_type"])
        for unit in units:
            values = unit_values(store, unit)[name]
            whole[name][unit * rows : unit * rows + len(values)] = values
    return whole


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


PLAIN_READER = """
import sys
site, path, out = sys.argv[1:]
sys.path.insert(0, site)  # with -I and -S nothing else is on the path, editable installs neither
import importlib.util, json
assert importlib.util.find_spec("looptap") is None
import numpy as np, xarray as xr, zarr
group = zarr.open_group(path, mode="r")
dataset = xr.open_zarr(path, chunks=None)
values = {"zarr_" + name: array[...] for name, array in group.arrays()}
values |= {"xarray_" + str(name): variable.values for name, variable in dataset.variables.items()}
np.savez(out, **values)
dims = {str(name): variable.dims for name, variable in dataset.variables.items()}
print(json.dumps({"dims": dims, "coords": sorted(map(str, dataset.coords)), "attrs": dataset.attrs}))
"""


# 1: units of one row; 5: smaller than any inner chunk; 700: inner chunks of 350, ragged; 1024: two inner
# chunks, the second sometimes missing; 1031: prime, so one inner chunk
@pytest.mark.parametrize("unit_tokens", [1, 5, 700, 1024, 1031])
@pytest.mark.slow
def test_plain_readers_read_what_was_written(tmp_path, unit_tokens):
    store = make_store(tmp_path / "run.zarr", unit_tokens)
    for unit in (2, 0):  # unit 1 stays missing
        run_unit(store, unit)
    site = str(Path(np.__file__).parent.parent)
    command = [sys.executable, "-I", "-S", "-W", "error", "-c", PLAIN_READER]
    done = subprocess.run(
        [*command, site, store.path, tmp_path / "out.npz"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen, values = json.loads(done.stdout), np.load(tmp_path / "out.npz")
    for name, array in expected(store, [0, 2]).items():
        np.testing.assert_array_equal(values[f"zarr_{name}"], array)
        np.testing.assert_array_equal(values[f"xarray_{name}"], array)
    np.testing.assert_array_equal(values["xarray_token_id"], np.arange(3 * unit_tokens) + 1)
    assert seen["dims"]["attention_entropy"] == ["token", "depth", "head"]
    assert seen["dims"]["state"] == ["token_state", "depth_state", "hidden"]
    assert seen["coords"] == sorted(
        ["depth", "stage", "token_id", "token_sequence", "sequence_length", "sequence_id", "unit_done"]
    )
    assert seen["attrs"] == {"looptap_format": 2, "plan": store.document}


@pytest.mark.parametrize(
    "rows, inner", [(1, 1), (511, 511), (512, 512), (700, 350), (4096, 512), (1031, 1031)]
)
def test_inner_chunks_divide_the_unit(rows, inner):
    assert inner_rows(rows) == inner and rows % inner == 0


def test_one_file_a_unit_and_array(tmp_path):
    store = make_store(tmp_path / "run.zarr", 700)
    for unit in range(3):
        run_unit(store, unit)
    for name, key in [("residual_norm", "c.{}.0"), ("attention_entropy", "c.{}.0.0"), ("state", "c.{}.0.0")]:
        files = sorted(p.name for p in (store.path / name).iterdir())
        assert files == sorted([key.format(unit) for unit in range(3)] + ["zarr.json"])
    chunks = zarr.open_array(store.path, path="state_wide", mode="r")
    assert (chunks.shards, chunks.chunks) == ((700, 2, HIDDEN), (350, 1, HIDDEN))
    files = sorted(p.name for p in (store.path / "state_split").iterdir())
    assert files == [f"c.{shard}.0.0" for shard in range(6)] + ["zarr.json"]
    assert store.shard_keys("state_split", 1) == ["state_split/c.2.0.0", "state_split/c.3.0.0"]


def test_a_unit_of_nothing_has_its_files(tmp_path):
    """zarr-python leaves out chunks equal to the fill; a unit's files must not depend on its content."""
    store = make_store(tmp_path / "run.zarr", 700)
    with begin_attempt(store, 1) as attempt:
        for name, rows in unit_values(store, 1).items():
            attempt.write(name, rows[:0])
        attempt.commit({"num_sequences": 0, "num_tokens": 0, "seconds": 0.0, "non_finite": {}})
    assert verify_store(store.path).problems == [] and len(store.entry(1)["shards"]) == len(store.arrays)
    for name, array in expected(store, []).items():
        np.testing.assert_array_equal(zarr.open_array(store.path, path=name, mode="r")[...], array)


def test_holes_take_no_space(tmp_path):
    """A tail of whole inner chunks is a hole in the shard's file, not stored as fill."""
    store = make_store(tmp_path / "run.zarr", 1024)
    with begin_attempt(store, 0) as attempt:
        for name, rows in unit_values(store, 0).items():
            attempt.write(name, rows[:100])
        entry = attempt.commit({"num_sequences": 1, "num_tokens": 100, "seconds": 0.0, "non_finite": {}})
    chunk_bytes = 512 * HIDDEN * 4
    (shard,) = entry["shards"]["state_wide"]  # one chunk of two per depth, and the index
    assert [piece[:2] for piece in shard["pieces"]] == [
        [0, chunk_bytes],
        [2 * chunk_bytes, chunk_bytes],
        [4 * chunk_bytes, shard["bytes"] - 4 * chunk_bytes],
    ]
    used = (store.path / shard["file"]).stat().st_blocks * 512
    assert used <= 2 * chunk_bytes + 4096 < 4 * chunk_bytes


def test_open_store_decodes_and_masks(tmp_path):
    store = make_store(tmp_path / "run.zarr", 700)
    for unit in (0, 2):
        run_unit(store, unit)
    # what an attempt killed between publishing and its ledger entry leaves
    for name in ("state/c.{}.0.0", "residual_norm/c.{}.0"):
        os.link(store.path / name.format(0), store.path / name.format(1))
    dataset, whole = open_store(store.path), expected(store, [0, 2])
    assert dataset["state"].dtype == np.float32
    np.testing.assert_array_equal(dataset["state"], as_float(whole["state"]))
    np.testing.assert_array_equal(dataset["residual_norm"], whole["residual_norm"])
    lengths = np.arange(3 * SEQUENCES) + 1
    lengths[SEQUENCES : 2 * SEQUENCES] = 0
    np.testing.assert_array_equal(dataset["sequence_length"], lengths)
    tokens = np.arange(2100) + 1
    tokens[700:1400] = -1
    np.testing.assert_array_equal(dataset["token_sequence"], tokens)
    assert "token_sequence" in dataset.coords and dataset["unit_done"].values.tolist() == [1, 0, 1]
    assert (dataset.attrs["units_done"], dataset.attrs["units_total"]) == (2, 3)
    assert verify_store(store.path).uncommitted == ["residual_norm/c.1.0", "state/c.1.0.0"]
    run_unit(store, 1)  # and the next attempt replaces it
    np.testing.assert_array_equal(
        open_store(store.path)["state"], as_float(expected(store, [0, 1, 2])["state"])
    )


@pytest.mark.parametrize("units", [[0, 2], [0, 1, 2]])
def test_any_selection_equals_numpy(tmp_path, units):
    store = make_store(tmp_path / "run.zarr", 700)
    for unit in units:
        run_unit(store, unit)
    dataset = open_store(store.path)
    state = as_float(expected(store, units)["state"])
    last = len(state) - 1
    for key in [
        (0,), (last,), (-1, 1), (slice(None), 0, 2), (slice(200, 500, 3), slice(None), [4, 1]),
        (slice(None, None, -100),), ([last, 0, 233, 232, 0], 1), ([1, 1], [0, 1], 3), (slice(0, 0),),
    ]:  # fmt: skip
        want = (
            state[key]
            if sum(isinstance(k, list) for k in key) < 2
            else state[np.ix_(key[0], key[1])][..., key[2]]
        )
        np.testing.assert_array_equal(dataset["state"][key], want, err_msg=str(key))
    at = xr.DataArray([5, 300, 698], dims="pick"), xr.DataArray([1, 0, 1], dims="pick")
    np.testing.assert_array_equal(dataset["state"][at], state[at[0].values, at[1].values])


def test_iter_units_streams_what_is_committed(tmp_path):
    store = make_store(tmp_path / "run.zarr", 700)
    for unit in (0, 2):
        run_unit(store, unit)
    whole = expected(store, [0, 2])
    parts = list(iter_units(store.path, ["residual_norm", "state"]))
    assert [part.attrs["unit"] for part in parts] == [0, 2]
    for part, unit in zip(parts, (0, 2), strict=True):
        assert set(part.data_vars) == {"residual_norm", "state"}
        rows = slice(700 * unit, 700 * (unit + 1))
        np.testing.assert_array_equal(part["residual_norm"], whole["residual_norm"][rows])
        np.testing.assert_array_equal(part["token_id"], np.arange(2100)[rows] + 1)
        np.testing.assert_array_equal(part["state"], as_float(whole["state"][233 * unit : 233 * (unit + 1)]))
        assert part.sizes["sequence"] == SEQUENCES
    some = open_store(store.path).isel(depth=[1, 3])
    assert [part.sizes["depth"] for part in iter_units(some)] == [2, 2]
    with pytest.raises(ValueError, match="axis token has 2099 entries, 3 units of 700 have 2100"):
        next(iter_units(some.isel(token=slice(1, None))))


def test_reading_one_unit_touches_no_other(tmp_path):
    """Streaming a large store must not read it whole: other units' files may even be broken."""
    store = make_store(tmp_path / "run.zarr", 700)
    for unit in range(3):
        run_unit(store, unit)
    for key in all_keys(store, 2):
        (store.path / key).write_bytes(b"broken")
    units = iter_units(store.path)
    assert (next(units).attrs["unit"], next(units).attrs["unit"]) == (0, 1)


def test_finish(tmp_path):
    store = make_store(tmp_path / "run.zarr", 5)
    run_unit(store, 0)
    with pytest.raises(StoreError, match="lacks 2 of 3 units"):
        store.finish()
    run_unit(store, 1)
    run_unit(store, 2)
    store.finish()
    closed = store.path / ".looptap"
    closed.joinpath("complete").unlink()  # killed just before the end
    store.finish()
    store.finish()
    assert xr.open_zarr(store.path, chunks=None)["unit_done"].values.tolist() == [1, 1, 1]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(closed / "summary.parquet").to_pydict()
    assert table["unit"] == [0, 1, 2] and table["num_non_finite"] == [0, 1, 2]
    assert [json.loads(text) for text in table["entry"]] == list(store.entries())
    assert table["num_bytes"] == [
        sum((store.path / key).stat().st_size for key in all_keys(store, unit)) for unit in range(3)
    ]
    assert not any((closed / "staging").iterdir()) and verify_store(store.path).ok
    (store.path / "residual_norm" / "c.1.0").unlink()
    closed.joinpath("complete").unlink()
    with pytest.raises(
        StoreError, match=r"c\.1\.0 should hold \d+ bytes of residual_norm, unit 1, but is missing"
    ):
        store.finish()


def test_status(tmp_path):
    store = make_store(tmp_path / "run.zarr", 5)
    begin_attempt(store, 1).fail("ValueError: out of memory")
    entries = [run_unit(store, unit) for unit in (0, 2)]
    status = store_status(store.path)
    assert (status.units_done, status.units_total, status.attempts) == (2, 3, 3)
    assert (status.num_tokens, status.num_sequences, status.seconds) == (20, 4, 1.0)
    shards = [s for entry in entries for shards in entry["shards"].values() for s in shards]
    assert status.num_bytes == sum(shard["bytes"] for shard in shards)
    assert status.num_bytes == sum(
        p.stat().st_size for name in store.arrays for p in (store.path / name).glob("c.*")
    )
    assert status.last_commit == entries[1]["committed"] and not status.complete
    (failure,) = status.failures
    assert (failure.unit, failure.attempt, failure.error) == (1, 1, "ValueError: out of memory")
    assert not failure.done and failure.host and failure.time and status.driver is None
    with driver_lock(store.path):
        at_work = store_status(store.path)
    assert at_work.driver is not None and at_work.driver.pid == os.getpid()
    for each in (status, at_work):
        assert StoreStatus.from_json(json.loads(json.dumps(each.to_json()))) == each


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["residual_norm/c.1.0", "state/c.1.0.0", "state_split/c.3.0.0", "token_id/c.0", "state/zarr.json"]
)
@pytest.mark.parametrize(
    "damage, what",
    [
        (flip, "crc32c"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes,"),
        (Path.unlink, "is missing"),
    ],
)
def test_verify_finds_damage(tmp_path, file, damage, what):
    store = make_store(tmp_path / "run.zarr", 700)
    for unit in range(2):
        run_unit(store, unit)
    report = verify_store(store.path)
    assert report.ok and (report.units_done, report.units_missing) == ([0, 1], [2])
    damage(store.path / file)
    (problem,) = verify_store(store.path).problems
    assert problem.file == file and what in problem.what
    assert problem.unit == (1 if "c.1" in file or "c.3" in file else None)


CLOSING = ["unit_done/c.0", ".looptap/summary.parquet"]


def test_verify_finds_a_damaged_ledger_and_mask(tmp_path):
    store = make_store(tmp_path / "run.zarr", 5)
    for unit in range(3):
        run_unit(store, unit)
    store.finish()
    assert verify_store(store.path).ok
    (store.path / "unit_done" / "c.0").unlink()
    assert [str(p) for p in verify_store(store.path).problems] == ["unit_done/c.0: is missing"]
    (store.path / ".looptap" / "summary.parquet").unlink()
    assert [p.file for p in verify_store(store.path).problems] == CLOSING
    entry = store.path / LEDGER / "1.json"
    whole = entry.read_bytes()
    # cut short; true JSON of the wrong unit; one number changed, which nothing else would tell
    other = (store.path / LEDGER / "0.json").read_bytes()
    changed = whole.replace(b'"num_tokens": 10,', b'"num_tokens": 11,')
    for damaged in (whole[:-20], other, changed, b"[]"):
        assert damaged != whole
        entry.write_bytes(damaged)
        (problem,) = (p for p in verify_store(store.path).problems if p.file not in CLOSING)
        assert problem.unit == 1 and "cannot be read" in problem.what
    entry.write_bytes(whole)
    (store.path / LEDGER / "7.json").write_bytes(other)
    (store.path / LEDGER / "notes.txt").write_bytes(b"")
    found = verify_store(store.path).foreign
    assert store.done() == [0, 1, 2] and found == [".looptap/ledger/7.json", ".looptap/ledger/notes.txt"]


def test_create_store_leaves_other_things_alone(tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "a.jpg").write_bytes(b"x")
    with pytest.raises(StoreExistsError, match=r"photos is not a looptap store, it holds a\.jpg"):
        make_store(foreign, 5)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreExistsError, match="file is a file, not a store"):
        make_store(tmp_path / "file", 5)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.jpg", "file", "photos"]
    (tmp_path / "empty").mkdir()
    assert not store_exists(tmp_path / "empty") and not store_exists(tmp_path / "nothing")
    make_store(tmp_path / "empty", 5)
    assert store_exists(tmp_path / "empty")
    with pytest.raises(StoreExistsError, match="empty holds a store"):
        make_store(tmp_path / "empty", 6)


def test_create_store_is_all_or_nothing(tmp_path):
    with pytest.raises(ValueError, match="coordinate names has type"):
        create_store(
            tmp_path / "run.zarr",
            plan=bare_plan(1),
            coordinates={"names": (("token",), np.array(["a"]), {})},
            arrays={},
        )
    wrong = ArraySpec(("token",), (9,), 5, "float32", {})
    with pytest.raises(ValueError, match="x has 9 rows, but 2 units of 5 rows make 10"):
        create_store(tmp_path / "run.zarr", plan=bare_plan(2), coordinates={}, arrays={"x": wrong})
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_no_store(tmp_path):
    with pytest.raises(StoreMissingError, match=r"nothing\.zarr does not exist"):
        open_store(tmp_path / "nothing.zarr")
    with pytest.raises(StoreError, match=r"is not a looptap store: it has no zarr\.json"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="is a Zarr group, not a looptap store"):
        open_store(tmp_path / "other.zarr")
    zarr.create_group(tmp_path / "newer.zarr", attributes={"looptap_format": 3})
    with pytest.raises(
        StoreError, match="is a store of format 3, this looptap reads format 2: upgrade looptap"
    ):
        verify_store(tmp_path / "newer.zarr")


def test_plan_differences(tmp_path):
    store = make_store(tmp_path / "run.zarr", 5)
    other = store.document | {"versions": {"looptap": "1"}, "created": "today", "hash": "other"}
    assert plan_differences(store.document, other) == []
    wanted = other | {"limit": None}
    wanted["settings"] = store.document["settings"] | {"seed": 1}
    assert plan_differences(store.document, wanted) == ["settings.seed: 0 -> 1", "limit: absent -> None"]
    assert plan_differences({"limit": None}, {}) == ["limit: None -> absent"]


def test_resolve_quantities():
    assert len(QUANTITIES) == 21
    assert resolve_quantities(["attention_peak", "steps", "step_norm"]) == (
        "step_norm",
        "step_cosine",
        "attention_peak",
    )
    assert resolve_quantities(["all"]) == tuple(name for name in QUANTITIES if name != "state")
    assert resolve_quantities(["state", "all"]) == tuple(QUANTITIES)
    with pytest.raises(
        ValueError, match=r"'norms' is not a quantity: choose from residual_norm, .*groups residual, "
    ):
        resolve_quantities(["norms"])
    with pytest.raises(ValueError, match="no quantity was chosen"):
        resolve_quantities([])
    absent = {"exit_probability": "this model has no exit gate"}
    assert resolve_quantities(["gaps", "exit"], absent) == ("gap_norm", "gap_cosine")
    with pytest.raises(ValueError, match="exit_probability cannot be captured: this model has no exit gate"):
        resolve_quantities(["gaps", "exit_probability"], absent)
    with pytest.raises(ValueError, match="exit holds nothing of this model: this model has no exit gate"):
        resolve_quantities(["exit"], absent)


def test_a_write_must_fit_its_array(tmp_path):
    store = make_store(tmp_path / "run.zarr", 5)
    with pytest.raises(ValueError, match="unit 3 is not in the plan: it has units 0 to 2"):
        begin_attempt(store, 3)
    attempt = begin_attempt(store, 0)
    for rows in (np.zeros((6, DEPTHS), np.float32), np.zeros((5, DEPTHS)), np.zeros((5, 1), np.float32)):
        with pytest.raises(
            ValueError, match=r"residual_norm takes up to 5 rows of float32 \[5\] a unit, not"
        ):
            attempt.write("residual_norm", rows)
    with pytest.raises(
        ValueError, match="cannot be committed without attention_entropy, residual_norm, state, state_split"
    ):
        attempt.commit({})
    assert store.todo() == [0, 1, 2]


@pytest.mark.apart
def test_opening_28_arrays_takes_a_tenth_of_a_second(tmp_path):
    arrays = {f"q{i}": ArraySpec(("token", "depth"), (30, 3), 10, "float32", {}) for i in range(21)}
    coordinates = {f"c{i}": (("token",), np.arange(30), {}) for i in range(6)}
    create_store(tmp_path / "run.zarr", plan=bare_plan(3), coordinates=coordinates, arrays=arrays)
    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            start = time.perf_counter()
            dataset = xr.open_zarr(tmp_path / "run.zarr", chunks=None)
            seconds.append(time.perf_counter() - start)
    assert len(dataset.variables) == 28 and min(seconds) <= 0.1, seconds


FILE_SIZE_LIMIT = """
import errno, resource, runpy, sys
from looptap.errors import StoreFullError
t = runpy.run_path(sys.argv[1])
store = t["Store"].open(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for step in (t["run_unit"], t["stream_states"]):
    try:
        step(store, 1)
    except StoreFullError as error:
        assert error.__cause__.errno == errno.EFBIG
        print(error)
"""


def test_file_size_limit_is_a_full_disk(tmp_path):
    """The writes fail in the kernel, after some of the unit's files were staged."""
    store = make_store(tmp_path / "run.zarr", 1024)
    run_unit(store, 0)
    command = [sys.executable, "-c", FILE_SIZE_LIMIT, __file__, str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("no room left to write unit 1") == 2
    assert store.done() == [0] and not any((store.path / STAGING).iterdir())
    assert verify_store(store.path).uncommitted == []
    run_unit(store, 1)


FULL_DISK = """
import os, runpy, subprocess, sys
from pathlib import Path
mount = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=True)
from looptap.errors import StoreFullError
from looptap.capture.store.care.verify import verify_store
t = runpy.run_path(sys.argv[1])
store = t["make_store"](mount / "run.zarr", 1024, 9)
done = 0
try:
    for done in range(9):
        t["run_unit"](store, done)
except StoreFullError as error:
    print(error)
assert 0 < done < 8 and store.done() == list(range(done)), done
assert not any((store.path / ".looptap/staging").iterdir())
report = verify_store(store.path)
assert report.ok and report.uncommitted == [], report
subprocess.run(["mount", "-o", "remount,size=9m", mount], check=True)
for unit in store.todo():
    t["run_unit"](store, unit)
store.finish()
assert verify_store(store.path).ok and store.todo() == []
"""


def test_a_disk_that_really_fills_up(tmp_path):
    """A 1 MB tmpfs in a mount namespace of its own, then more room and the same units again."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        allowed = subprocess.run([*namespace, "true"], check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine does not let users mount a tmpfs")
    command = [*namespace, sys.executable, "-c", FULL_DISK, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout and "nothing of it was published" in done.stdout
