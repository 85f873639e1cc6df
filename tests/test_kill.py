"""A real capture stopped by signals, and the same command again: the finished store is that of a capture left
in peace, and no unit ran again after its commit. test_chaos.py kills at random moments.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import psutil
import pytest
import zarr

from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import ATTEMPTS, LEDGER, STAGING
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store

pytestmark = pytest.mark.slow

UNIT_TOKENS = 48
# a drawn initial state, gaps, attention and kept states: everything that a unit can hold
MODEL = "random:(0,2x3,0)I,width=32,heads=2"
OPTIONS = ["--states", "core[all]@last", "--tokens", "last"]


def write_ids(directory: Path, num_units: int) -> Path:
    """Rows of just over half a unit, so that each is a unit of its own, which takes tens of milliseconds."""
    path = directory / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (num_units, UNIT_TOKENS // 2 + 1)))
    return path


def start(
    ids_path: Path, store_path: Path, *options: str, unit_tokens: int = UNIT_TOKENS
) -> subprocess.Popen:
    command = ["capture", MODEL, "--data", str(ids_path), "--store", str(store_path), *OPTIONS, *options]
    command += ["--unit-tokens", str(unit_tokens)]
    # lines are looked for whole
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    return subprocess.Popen(
        [sys.executable, "-m", "looptap", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        # a shell's background jobs, and so perhaps this test, are started with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(capture: subprocess.Popen) -> str:
    """What a capture that must succeed said."""
    said, _ = capture.communicate()
    assert capture.returncode == 0, said
    return said


def num_committed(path: Path) -> int:
    return len(os.listdir(path / ".looptap" / "ledger")) if path.exists() else 0


def wait_for_units(capture: subprocess.Popen, path: Path, num_units: int) -> None:
    """Until so many units are committed, or the capture ended."""
    while num_committed(path) < num_units and capture.poll() is None:
        time.sleep(0.001)


def content(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every array of a store, coordinates too, by its bytes: NaN as it was written."""
    group = zarr.open_group(str(path), mode="r")
    for name, array in sorted(group.arrays()):
        yield name, np.asarray(array[...]).tobytes()


def check_equal(path: Path, calm_path: Path) -> None:
    """Sound, complete and equal to a capture in peace, with no attempt at a unit after its commit."""
    report = verify_store(path)
    assert report.ok and not report.units_missing and not report.uncommitted, report
    for (name, values), (wanted_name, wanted) in zip(content(path), content(calm_path), strict=True):
        assert name == wanted_name and values == wanted, name
    store = Store.open(path)
    attempts: dict[int, list[int]] = {unit: [] for unit in range(store.num_units)}
    for file in (store.path / ATTEMPTS).iterdir():
        unit, number = map(int, file.name.split("."))
        attempts[unit].append(number)
        assert file.stat().st_mtime_ns <= (store.path / LEDGER / f"{unit}.json").stat().st_mtime_ns, file
        assert file.stat().st_size == 0, file.read_text()  # an attempt that raised notes why
    for entry in store.entries():  # one a unit, of its last attempt
        assert sorted(attempts[entry["unit"]]) == list(range(1, entry["attempt"] + 1)), entry
    assert [entry["unit"] for entry in store.entries()] == list(range(store.num_units))
    assert not any((store.path / STAGING).iterdir())


@pytest.fixture(scope="module")
def calm_store(tmp_path_factory) -> Path:
    """Forty units captured in peace, beside their ids."""
    path = tmp_path_factory.mktemp("calm") / "run.zarr"
    finish(start(write_ids(path.parent, 40), path))
    return path


STOPS = [("SIGINT", []), ("SIGTERM", []), ("SIGINT", ["--workers", "2"])]


@pytest.mark.parametrize(("name", "options"), STOPS, ids=["ctrl-c", "terminated", "ctrl-c with workers"])
def test_a_stop_finishes_what_is_in_flight(tmp_path, calm_store, name, options):
    """Sent to every process of the group, as a terminal does."""
    path, ids_path = tmp_path / "run.zarr", calm_store.with_name("ids.npy")
    capture = start(ids_path, path, *options)
    wait_for_units(capture, path, 3)
    os.killpg(capture.pid, signal.Signals[name])
    said, _ = capture.communicate()
    assert capture.returncode == 130, said
    assert "finishing the units in flight; Ctrl-C again stops at once" in said
    assert "s; what is committed is safe, the same command continues" in said and "Traceback" not in said
    assert "is lost" not in said, "a worker did not outlive the signal"
    store = Store.open(path)
    done = set(store.done())
    assert 3 <= len(done) < 40 and f"{len(done)} of 40 units are in {path}; this run took" in said
    begun = {int(item.name.split(".")[0]) for item in (store.path / ATTEMPTS).iterdir()}
    assert begun == done, "a unit that was begun was not finished"
    assert not any((store.path / STAGING).iterdir())
    assert not (path / ".looptap" / "driver.lock").exists()
    assert f"40 of 40 units are in {path}, {len(done)} of them before" in finish(start(ids_path, path))
    check_equal(path, calm_store)


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["", "workers"])
def test_ctrl_c_twice_stops_at_once(tmp_path, options):
    """The second Ctrl-C comes in the middle of a unit that would take minutes."""
    np.save(tmp_path / "ids.npy", np.zeros((2, 65_536), np.int32))
    path = tmp_path / "run.zarr"
    capture = start(tmp_path / "ids.npy", path, *options, unit_tokens=65_536)
    attempts_dir = path / ".looptap" / "attempts"
    while capture.poll() is None and not (attempts_dir.exists() and os.listdir(attempts_dir)):
        time.sleep(0.01)
    os.killpg(capture.pid, signal.SIGINT)
    assert capture.stdout is not None
    lines = [capture.stdout.readline()]
    while lines[-1] and "finishing the units in flight" not in lines[-1]:
        lines.append(capture.stdout.readline())
    capture.send_signal(signal.SIGINT)
    said, _ = capture.communicate()
    assert capture.returncode == 130, "".join(lines) + said
    assert "what is committed is safe" in said and "Traceback" not in said
    assert num_committed(path) == 0 and not (path / ".looptap" / "driver.lock").exists()


def frozen_worker(capture: subprocess.Popen, path: Path) -> psutil.Process:
    """Stops a worker for good while it has units, after enough are done for a median."""
    wait_for_units(capture, path, 6)
    workers = [child for child in psutil.Process(capture.pid).children() if "-m" in child.cmdline()]
    workers[0].send_signal(signal.SIGSTOP)
    return workers[0]


@pytest.mark.apart
def test_a_frozen_worker_does_not_hold_the_run(tmp_path, calm_store):
    path, ids_path = tmp_path / "run.zarr", calm_store.with_name("ids.npy")
    capture = start(ids_path, path, "--workers", "2")
    worker = frozen_worker(capture, path)
    said = finish(capture)
    assert f"40 of 40 units are in {path}" in said and "failed" not in said
    assert not worker.is_running()
    check_equal(path, calm_store)


@pytest.mark.full
@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGTERM", "SIGINT"]], ids=["terminated", "ctrl-c twice"])
def test_a_run_with_a_frozen_worker_can_be_stopped(tmp_path, calm_store, signals):
    """Once: as soon as its unit is slow. Twice: at once."""
    path, ids_path = tmp_path / "run.zarr", calm_store.with_name("ids.npy")
    capture = start(ids_path, path, "--workers", "1")
    worker = frozen_worker(capture, path)
    for name in signals:
        capture.send_signal(signal.Signals[name])
        if name != signals[-1]:
            assert capture.stdout is not None
            while "finishing the units in flight" not in capture.stdout.readline():
                assert capture.poll() is None
    said, _ = capture.communicate()
    assert capture.returncode == 130 and "Traceback" not in said, said
    assert ("the run is to stop" in said) == (len(signals) == 1)
    assert not worker.is_running() and not (path / ".looptap" / "driver.lock").exists()
    finish(start(ids_path, path))
    check_equal(path, calm_store)


def test_what_the_dead_left_is_in_nobodys_way(tmp_path, calm_store):
    """A unit of another attempt half staged, half published, with another content, and a lock of the dead."""
    path, ids_path = tmp_path / "run.zarr", calm_store.with_name("ids.npy")
    capture = start(ids_path, path)
    wait_for_units(capture, path, 3)
    capture.kill()
    capture.communicate()
    store = Store.open(path)
    orphan = begin_attempt(store, 39)
    for name, array in store.arrays.items():
        shape = (1, *array["shape"][1:])
        orphan.write(name, np.full(shape, 7, array["data_type"]))
    for staged in (store.path / STAGING / "39.1").glob("attention*"):
        os.link(staged, path / unquote(staged.name))
    assert len(verify_store(path).uncommitted) >= 4
    finish(start(ids_path, path))
    check_equal(path, calm_store)
    assert json.loads((store.path / LEDGER / "39.json").read_text())["attempt"] == 2
