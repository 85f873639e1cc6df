"""Every library reads from a store what looptap wrote, with nothing of looptap in the process.

The same script runs in environments that have no looptap at all, with an old and a new zarr: `make interop`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from looptap.tests.state_stores import write_plain_stores

SCRIPT = Path(__file__).with_name("plain_readers.py")
READERS = [
    "zarr_python",
    "zarrs_pipeline",
    "tensorstore_plain",
    "tensorstore_bfloat16",
    "xarray_alone",
    "xarray_dask",
]


def read_plainly(path: Path, expected_path: Path) -> subprocess.CompletedProcess:
    site = Path(np.__file__).parents[1]
    # with -I and -S nothing else is on the path, editable installs neither
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(path), str(expected_path), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[tuple[Path, Path]]:
    return write_plain_stores(tmp_path_factory.mktemp("stores"))


@pytest.mark.slow
def test_all_readers_find_what_was_written(stores):
    for path, expected_path in stores:
        done = read_plainly(path, expected_path)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["readers"] == READERS
        assert {"state", "state_all", "state_wide", "state_packed", "residual_norm"} < set(found["arrays"])


@pytest.mark.parametrize("name", ["state_all", "state_packed", "residual_norm", "lens_token"])
@pytest.mark.slow
def test_another_value_is_noticed(stores, tmp_path, name):
    path, expected_path = stores[2]
    expected = dict(np.load(expected_path))
    expected[name][(5, *(1 for _ in expected[name].shape[1:]))] += 1
    np.savez(tmp_path / "other.npz", **expected)
    done = read_plainly(path, tmp_path / "other.npz")
    assert done.returncode == 1 and f"zarr_python: {name}" in done.stderr
