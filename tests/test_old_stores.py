"""Stores that earlier versions wrote: opened, verified, gone on with. tests/stores/README.md says which."""

import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import looptap
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.plan import StoredPlan, plan_of
from looptap.capture.store.writing.commit import Store
from looptap.cli.entry import main

HERE = Path(__file__).parent
SETTINGS = ["--loop", "1-2x3", "--unit-tokens", "16", "--device", "cpu", "--states", "core[all]@last"]
QUANTITIES = ["--quantities", "residual", "steps", "gaps", "attention"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    with tarfile.open(HERE / "stores" / "0.1.0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "0.1.0"


@pytest.mark.parametrize("name", ["whole", "half", "watched"])
def test_they_open_and_verify(stores, name):
    path = stores / f"{name}.zarr"
    report = verify_store(path)
    assert report.ok and len(report.units_missing) == (name == "half")
    dataset = looptap.open(path, missing="mask")
    filled = dataset.token_sequence.values >= 0
    norm_ND = dataset.residual_norm.values[filled]
    plan = plan_of(dataset)
    assert np.isfinite(norm_ND).all()
    assert len(norm_ND) == plan.num_tokens * (2 / 3 if name == "half" else 1)
    assert (
        plan.model.is_watched == (name == "watched") and plan.model.core == 2 and plan.model.recurrences == 3
    )
    assert plan.model.depth == dataset.sizes["depth"]


@pytest.mark.parametrize("name", ["whole", "half"])
def test_a_plan_read_is_the_plan_that_was_written(stores, name):
    """They agree to the byte, and the hash follows from the fields."""
    text = (stores / f"{name}.zarr" / ".looptap" / "plan.json").read_text()
    plan = StoredPlan.from_json(json.loads(text))
    assert json.dumps(plan.to_json(), indent=1) == text
    assert replace(plan, recorded_hash=None).hash == plan.hash == json.loads(text)["hash"]


def test_what_a_watched_plan_lacks_is_unknown(stores):
    plan = Store.open(stores / "watched.zarr").plan
    assert plan.model.head_width is None and plan.model.block is None and plan.tokenizer is None
    assert plan.settings.looped_layers is None and plan.settings.batch_tokens is None
    assert plan.model.blocks == ("layers.0", "layers.1") * 3


def test_a_capture_that_was_begun_goes_on(stores, tmp_path, monkeypatch):
    """The same command finishes it, and its arrays are those of a capture that was never stopped."""
    path = tmp_path / "half.zarr"
    shutil.copytree(stores / "half.zarr", path)
    before = {file: file.stat().st_mtime_ns for file in path.glob("residual_norm/c.*")}
    command = ["capture", HERE / "golden" / "llama", "--data", stores / "ids.npy", "--store", path]
    monkeypatch.setattr(sys, "argv", ["looptap", *map(str, command), *SETTINGS, *QUANTITIES])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and Store.open(path).todo() == []
    assert all(file.stat().st_mtime_ns == time for file, time in before.items()), "a unit was done again"
    mine, whole = (zarr.open_group(str(each), mode="r") for each in (path, stores / "whole.zarr"))
    for name, array in whole.arrays():
        np.testing.assert_allclose(
            np.asarray(mine[name][...], np.float64), np.asarray(array[...], np.float64), rtol=1e-5, atol=1e-6
        )
