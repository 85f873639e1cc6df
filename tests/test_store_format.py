"""docs/store-format.md says every field of a store and no other: held to the types and to what is written."""

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import looptap
from looptap.capture.store import keys
from looptap.capture.store import plan as stored
from looptap.capture.store.group import FORMAT
from looptap.capture.store.places.lock import driver_lock
from looptap.capture.store.places.object_lock import ObjectLock
from looptap.capture.store.quantities import QUANTITIES
from looptap.capture.store.writing.attempt import Attempt
from looptap.capture.store.writing.commit import Store

TEXT = (Path(__file__).parents[1] / "docs" / "store-format.md").read_text()
TYPES = {
    "The plan": stored.StoredPlan,
    "model": stored.StoredModel,
    "model.block": stored.StoredBlock,
    "model.block.rotary": stored.StoredRotary,
    "data": stored.StoredData,
    "tokenizer": stored.StoredTokenizer,
    "settings": stored.StoredSettings,
}


def tables_of(heading: str) -> list[dict[str, list[str]]]:
    """The tables under a heading: first cell -> the others, without the row of headings."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    found = []
    for block in blocks:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()[2:]]
        found.append({row[0].strip("`"): row[1:] for row in rows})
        assert len(found[-1]) == len(rows), f"{heading} names something twice"
    return found


def table_of(heading: str) -> dict[str, list[str]]:
    (table,) = tables_of(heading)
    return table


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A store with every quantity that such a model has, states of some tokens, and neurons."""
    path = tmp_path_factory.mktemp("format") / "run.zarr"
    looptap.capture(
        "random:(1,2x3,1)I,width=32,heads=2",
        ["one, two, three", "four", "five and six and seven"],
        store=path,
        quantities=("all",),
        states=("core[all]@last",),
        tokens="every:2",
        dtype="bfloat16",
        device="cpu",
        unit_tokens=24,  # two units, the first with an empty slot
        neurons=True,
    )
    return path


@pytest.fixture(scope="module")
def group(path) -> dict[str, typing.Any]:
    return json.loads((path / "zarr.json").read_text())


@pytest.fixture(scope="module")
def arrays(group) -> dict[str, dict[str, typing.Any]]:
    return group["consolidated_metadata"]["metadata"]


def test_the_page_is_about_the_format_that_is_written(group):
    assert f"The present format is **{FORMAT}**" in TEXT
    assert set(group["attributes"]) == set(table_of("Group attributes"))
    assert group["attributes"]["looptap_format"] == FORMAT


@pytest.mark.parametrize("heading", TYPES)
def test_the_page_names_the_fields_of_the_types(heading):
    hints = typing.get_type_hints(TYPES[heading])
    known = {field.name: hints[field.name] for field in dataclasses.fields(TYPES[heading])}
    if heading == "The plan":
        known["hash"] = known.pop("recorded_hash")
    documented = table_of(heading)
    assert set(documented) == set(known)
    for name, (type_text, *_) in documented.items():
        may_be_none = types.NoneType in typing.get_args(known[name]) and name != "hash"
        assert bool(re.search("null|absent|empty", type_text)) == may_be_none, name


def test_a_written_plan_has_these_fields(group):
    plan = group["attributes"]["plan"]
    model = plan["model"]
    parts = {
        "The plan": plan,
        "model": model | {"blocks": []},
        "model.block": model["block"],
        "model.block.rotary": model["block"]["rotary"],
        "model.neurons": model["neurons"],
        "data": plan["data"],
        "tokenizer": plan["tokenizer"] | {"special_tokens": "none"},
        "settings": plan["settings"],
    }
    assert {heading: set(part) for heading, part in parts.items()} == {
        heading: set(table_of(heading)) for heading in parts
    }
    of_block = set(re.findall(r"`(\w+)`", table_of("model.neurons")["blocks"][1]))
    assert all(set(block) == of_block for block in model["neurons"]["blocks"])


def test_keys_are_those_of_the_code_and_of_a_store(path):
    known = {value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
    assert set(table_of("The folder .looptap")) == known
    written = {f".looptap/{entry.name}" for entry in (path / ".looptap").iterdir()}
    assert written <= known
    assert known - written == {".looptap/driver.lock", ".looptap/making.json"}


def test_a_ledger_entry_has_these_fields(path):
    entry = json.loads((path / keys.entry_key(0)).read_text())
    assert set(entry) == set(table_of("Ledger entry"))
    files = [file for shards in entry["shards"].values() for file in shards]
    assert all(set(file) == set(table_of("A file of an entry")) for file in files)
    assert set(pq.read_schema(path / keys.SUMMARY).names) == set(table_of("Summary"))


def test_a_failed_attempt_has_these_fields(path):
    with driver_lock(path):
        attempt = Attempt(Store.open(path), 0, 2)
        attempt.fail("RuntimeError: for this test")
        note_path = path / keys.attempt_key(0, 2)
        note = json.loads(note_path.read_text())
        note_path.unlink()
    assert set(note) == set(table_of("Failed attempt"))


class FakeBucket:
    """Keeps what was put last."""

    def put(self, key: str, data: bytes, **_: object) -> str:
        self.data = data
        return "tag"

    def find(self, key: str) -> None:
        return None


def test_locks_have_these_fields(path):
    documented = table_of("Driver lock")
    with driver_lock(path):
        on_disk = json.loads((path / keys.DRIVER_LOCK).read_text())
    assert set(on_disk) == {
        name for name, cells in documented.items() if "object stores only" not in cells[1]
    }
    bucket = FakeBucket()
    ObjectLock(bucket, None).release()  # type: ignore[arg-type]
    assert set(json.loads(bucket.data)) == set(documented)


def test_coordinates_are_these(group, arrays):
    written = {name: arrays[name] for name in group["attributes"]["coordinates"].split()}
    documented = table_of("Coordinates")
    assert set(documented) == set(written)
    extra = set()
    for name, (axis, dtype, _, _) in documented.items():
        array = written[name]
        assert (array["dimension_names"], array["data_type"]) == ([axis], dtype), name
        assert array["fill_value"] == (0 if name == "unit_done" else -1)
        assert array["codecs"][-1]["configuration"]["level"] == 1
        extra |= {(name, attribute) for attribute in array["attributes"]} - {(name, "long_name")}
    assert extra == {("stage", "flag_values"), ("stage", "flag_meanings"), ("unit_done", "note")}


def test_empty_slots_are_these(path, group):
    plan = group["attributes"]["plan"]
    assert plan["num_units"] * plan["unit_tokens"] > plan["num_tokens"]
    dataset = looptap.open(path).load()
    is_empty = {
        "token": dataset["token_position"].values < 0,
        "sequence": dataset["sequence_start"].values < 0,
        "token_state": dataset["state_token"].values < 0,
    }
    assert all(empty.any() for empty in is_empty.values())
    for name, (axis, _, value, _) in table_of("Coordinates").items():
        if value:
            assert set(dataset[name].values[is_empty[axis]].tolist()) == {int(value)}, name
    for name in QUANTITIES:
        if name in dataset:
            values = dataset[name].values[is_empty[str(dataset[name].dims[0])]]
            assert (values == -1 if values.dtype.kind == "i" else np.isnan(values)).all(), name


def test_quantities_are_these(group, arrays):
    documented, attributes = tables_of("Quantities")
    axes = {name: (", ".join(q.axes), q.dtype) for name, q in QUANTITIES.items() if name != "state"}
    assert {name: tuple(cells) for name, cells in documented.items() if name != "state"} == axes
    assert documented["state"][0] == ", ".join(QUANTITIES["state"].axes)
    written = {name: array for name, array in arrays.items() if name in QUANTITIES}
    assert list(written) == group["attributes"]["plan"]["settings"]["quantities"]
    assert set().union(*(array["attributes"] for array in written.values())) == set(attributes)
    state = written.pop("state")
    assert (state["data_type"], state["fill_value"]) == ("uint16", 0x7FC0)
    assert state["dimension_names"] == ["token_state", "depth_state", "hidden"]
    for name, array in written.items():
        assert array["dimension_names"] == list(QUANTITIES[name].axes)
        assert array["data_type"] == QUANTITIES[name].dtype
        assert array["fill_value"] == ("NaN" if array["data_type"] == "float32" else -1)
        assert [codec["name"] for codec in array["codecs"]] == ["bytes", "zstd"]


def test_a_bare_shard_is_a_tensor_and_an_index(path, arrays):
    state = arrays["state"]
    assert [codec["name"] for codec in state["codecs"]] == ["sharding_indexed"]
    rows, depths, width = shard = state["chunk_grid"]["configuration"]["chunk_shape"]
    raw = np.fromfile(path / "state" / "c.0.0.0", np.uint16)[: math.prod(shard)]
    values = looptap.open(path, decode=False)["state"][:rows].values
    is_filled = values[:, 0, 0] != 0x7FC0
    assert is_filled.any()
    tensor = raw.reshape(depths, rows, width).transpose(1, 0, 2)
    np.testing.assert_array_equal(tensor[is_filled], values[is_filled])


def test_the_example_reads_what_looptap_reads(path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(path.parent)
    found: dict[str, typing.Any] = {}
    exec(code, found)
    dataset = looptap.open(path).load()
    in_core = (dataset["stage"] == 1) & (dataset["recurrence"] == 2)
    norm = dataset["residual_norm"].isel(depth=np.flatnonzero(in_core))
    assert set(found["norms"]) == {0, 1, 2}
    for row, values in found["norms"].items():
        (index,) = np.flatnonzero(dataset["sequence_id"].values == row)
        mine = dataset["token_sequence"].values == index
        assert len(values) == len(["one, two, three", "four", "five and six and seven"][row])
        np.testing.assert_array_equal(values, norm.values[mine])
    np.testing.assert_array_equal(found["values"], dataset["state"].values)
    assert found["is_filled"].sum() == np.isfinite(dataset["state"].values[:, 0, 0]).sum()
