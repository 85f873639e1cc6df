"""Pools of this machine keep the contract of all pools, and a capture on them is the same capture."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Thread

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from looptap.capture.engines import drive, processes, work
from looptap.capture.engines.drive import run_on
from looptap.capture.engines.engine import open_engine
from looptap.capture.engines.events import Receipt, UnitDone, WorkerJoined
from looptap.capture.engines.local import ThisProcess
from looptap.capture.engines.patience import Limits
from looptap.capture.engines.processes import Processes
from looptap.capture.engines.work import make_recipe
from looptap.capture.plan import make_plan
from looptap.capture.run import prepare_store, run_capture
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.writing.commit import Store
from looptap.errors import EngineError, PlanError, RecipeError, StoreLockedError, UnitTakenError
from looptap.tests.engine_contract import (
    Files,
    PoolContract,
    ProcessPoolContract,
    Threads,
    ended,
    is_alive,
    run,
)

TINY = "random:(0,2x3,0)I,width=32,heads=2"


class TestThisProcess(PoolContract):
    limits = Limits(depth=1)

    @pytest.fixture
    def make_pool(self):
        return lambda recipe, num_workers: ThisProcess(recipe)

    def test_what_keeps_the_worker_from_being_made_is_raised_as_it_is(self, make_pool, tmp_path):
        files = Files(tmp_path, cannot="no such model")
        with pytest.raises(ValueError, match=r"^no such model$"):
            run(make_pool, files, 3, 1, limits=self.limits)


@pytest.mark.apart
class TestProcesses(ProcessPoolContract):
    @pytest.fixture
    def make_pool(self):
        return Processes

    def test_a_death_is_noticed_at_once(self, make_pool, tmp_path):
        files = Files(tmp_path, long=frozenset({0}))
        with make_pool(files, 1) as pool:
            pool.start(0)
            pool.give(0, 0)
            while not files.workers():
                list(pool.poll(0.1))
            os.kill(*files.workers(), signal.SIGKILL)
            began_s = time.monotonic()
            assert [report.why for report in pool.poll(60)] == ["exit -9"]
            assert time.monotonic() - began_s < 30

    def test_a_worker_ends_with_its_pipe(self, make_pool, tmp_path):
        """The pipe tells it that its driver died where the kernel does not, even in the middle of a unit."""
        files = Files(tmp_path, long=frozenset({0}))
        with make_pool(files, 1) as pool:
            pool.start(0)
            pool.give(0, 0)
            while not files.workers():
                list(pool.poll(0.1))
            child, pipe = pool._children[0]
            pipe.close()
            assert child.wait(30) == 1

    def test_signals_are_for_the_driver(self, make_pool, tmp_path):
        """A job manager sends its own to every process; a terminal's do not even reach the workers."""
        files = Files(tmp_path, waits=True)
        with make_pool(files, 1) as pool:
            events = []
            for event in run_on(pool, range(3), committed=files.committed, wanted=1):
                events.append(event)
                if isinstance(event, WorkerJoined):
                    Thread(target=self.signal_and_go_on, args=(files,)).start()
        assert ended(events) == dict.fromkeys(range(3), "done")
        assert files.workers() == {self.group}

    def signal_and_go_on(self, files):
        while not files.workers():
            time.sleep(0.01)
        (pid,) = files.workers()
        self.group = os.getpgid(pid)
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        (files.directory / "go").touch()

    def test_each_worker_has_a_gpu_of_its_own_and_its_heir_the_same(self, tmp_path):
        """No GPU is needed to see what the workers are shown."""
        files = Files(tmp_path, kills={2: 1}, seconds=0.1)
        run(lambda recipe, n: Processes(recipe, n, ["0", "GPU-7f", "2"]), files, 16, 3)
        shown = list(files.gpus().values())
        assert len(shown) == 4 and set(shown) == {"0", "GPU-7f", "2"}

    def test_a_worker_that_does_not_die_keeps_its_place_and_its_gpu(self, monkeypatch, tmp_path):
        """Such a worker waits inside the kernel for a disk; here it is stopped."""
        monkeypatch.setattr(processes, "DEATH_S", 0.1)
        with Processes(Files(tmp_path), 2, ["0", "1"]) as pool:
            pool.start(0)
            pool.start(1)
            child, _ = pool._children[0]
            child.send_signal(signal.SIGSTOP)  # or it would see that its pipe is closed
            with monkeypatch.context() as patch:
                patch.setattr(child, "kill", lambda: None)
                pool.kill(0)
                assert pool.num_places() == 1 and pool._gpu_of == {0: "0", 1: "1"}
            child.kill()
            child.wait()
            assert pool.num_places() == 2
            pool.start(2)
            assert pool._gpu_of == {1: "1", 2: "0"}

    @pytest.mark.parametrize(
        ("num_workers", "environment", "threads"), [(1, None, 1), (3, None, 1), (1, "1", 1)]
    )
    def test_workers_share_the_cores(self, monkeypatch, num_workers, environment, threads):
        """Unless the environment says how many threads there are to be."""
        if environment is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", environment)
        with Processes(Threads(), num_workers) as pool:
            events = list(run_on(pool, [0], committed=lambda unit: None, wanted=1))
        assert [e.receipt.num_tokens for e in events if isinstance(e, UnitDone)] == [threads]


@pytest.fixture
def settings(tmp_path) -> CaptureSettings:
    """Nine units."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 256, (9, 25)))
    return CaptureSettings.of(
        model=TINY,
        data=tmp_path / "ids.npy",
        store=tmp_path / "run.zarr",
        unit_tokens=48,
        states=("core[all]@last",),
    )


def content(path: Path) -> dict[str, bytes]:
    """Every file that holds values."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("c.*"))}


@pytest.mark.slow
def test_a_capture_by_processes_is_that_of_this_process(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = run_capture(make_plan(settings))
    finally:
        torch.set_num_threads(num_threads)
    by_processes = settings.but(store=tmp_path / "processes.zarr", workers=2)
    outcome = run_capture(make_plan(by_processes))
    assert outcome.complete and outcome.num_units == here.num_units == 9
    found = content(tmp_path / "processes.zarr")
    assert len(found) > 9 * 10 and found == content(settings.run.store)
    pids = {entry["pid"] for entry in Store.open(tmp_path / "processes.zarr").entries()}
    assert os.getpid() not in pids


@pytest.mark.slow
def test_who_works_is_not_of_the_plan(settings):
    """So a capture goes on with another engine than it was begun with."""
    plan = make_plan(settings)
    other = make_plan(settings.but(workers=3, unit_limit_s=60.0, engine="ray", ray_address="a:1"))
    assert plan.stored().hash == other.stored().hash
    store = prepare_store(plan)
    assert store.todo() and run_capture(make_plan(settings.but(workers=1))).complete


def test_a_run_whose_lock_was_taken_over_stops(settings):
    """It is taken over as if this process had been stopped for minutes: whoever holds the lock now drives."""

    def taken_over() -> bool:
        (settings.run.store / ".looptap" / "driver.lock").unlink(missing_ok=True)
        time.sleep(1.1)  # until it looks again
        return True

    with pytest.raises(StoreLockedError, match=r"another run has taken .* over"):
        run_capture(make_plan(settings), goes_on=taken_over)
    assert len(Store.open(settings.run.store).todo()) >= 7


def test_a_run_that_is_told_to_stop_leaves_the_rest(settings):
    plan = make_plan(settings)
    outcome = run_capture(plan, goes_on=lambda: len(Store.open(settings.run.store).done()) < 4)
    assert (outcome.complete, outcome.num_left, outcome.num_resumed) == (False, 5, 0)
    assert Store.open(settings.run.store).done() == [0, 1, 2, 3]
    outcome = run_capture(plan)
    assert (outcome.complete, outcome.num_left, outcome.num_resumed) == (True, 0, 4)


@pytest.fixture
def checkpoint(settings, tmp_path):
    """A recipe for a checkpoint's capture, and the checkpoint's directory."""
    import shutil

    model_dir = tmp_path / "model"
    golden = Path(__file__).parent / "golden" / "llama"
    shutil.copytree(golden, model_dir, ignore=shutil.ignore_patterns("inputs*", "reference*", "README*"))
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    plan = make_plan(settings.but(model=str(model_dir), states=()))
    return make_recipe(plan, prepare_store(plan)), model_dir


def test_a_recipe_makes_a_worker(checkpoint):
    recipe, _ = checkpoint
    assert recipe()(0).num_tokens == 48
    assert recipe()(0).num_tokens == 48, "committed already, which is as good"


class OtherWorker:
    """A worker whose attempts are stopped by later ones of another, on a clock that sleeping moves."""

    def __init__(self, monkeypatch, seconds: float, commits_at_s: float):
        self.now_s, self.seconds, self.commits_at_s, self.num_begun = 0.0, seconds, commits_at_s, 0
        monkeypatch.setattr(work, "time", self)
        monkeypatch.setattr(work, "committed", self.committed)

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def committed(self, store, unit) -> Receipt | None:
        return Receipt(num_tokens=unit) if self.now_s >= self.commits_at_s else None

    def run(self, unit: int) -> dict:
        self.num_begun += 1
        self.now_s += self.seconds
        raise UnitTakenError("a later attempt has begun")


def test_a_slow_worker_lets_the_later_attempt_commit(monkeypatch):
    """A third attempt would stop the second, which takes as long as the first did."""
    for seed in range(20):
        monkeypatch.setattr(work.random, "random", Random(seed).random)
        other = OtherWorker(monkeypatch, seconds=100, commits_at_s=199)
        assert work.run_unit(other, None, 7) == Receipt(num_tokens=7)
        assert other.num_begun == 1 and other.now_s < 202


def test_a_later_attempt_that_died_is_not_waited_for_for_ever(monkeypatch):
    other = OtherWorker(monkeypatch, seconds=100, commits_at_s=float("inf"))
    with pytest.raises(UnitTakenError):
        work.run_unit(other, None, 7)
    assert other.num_begun == 5 and 1000 < other.now_s < 1600


def test_a_run_that_was_stopped_itself_thinks_no_worker_slow(monkeypatch):
    """A job manager may stop all its processes for an hour."""
    seconds = iter([10.0, 10.5, 3610.5, 3611.0])
    monkeypatch.setattr(drive.time, "monotonic", lambda: next(seconds))
    clock = drive._Clock()
    assert [clock.now_s() for _ in range(3)] == [0.5, 5.5, 6.0]


def test_other_weights_are_refused(checkpoint):
    recipe, model_dir = checkpoint
    path = next(model_dir.glob("*.safetensors"))
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)
    with pytest.raises(
        RecipeError, match=r"is not the model .* differs in weights_sha256 \w+ \(planned: \w+\)"
    ):
        recipe()


def test_another_store_at_the_same_path_is_refused(checkpoint):
    recipe, _ = checkpoint
    with pytest.raises(RecipeError, match="is another store here"):
        replace(recipe, created="2020-01-01T00:00:00+00:00")()


def test_other_initial_states_are_refused(settings, tmp_path):
    save_file({"input_states": np.ones((9, 25, 32), np.float32)}, tmp_path / "states.safetensors")
    plan = make_plan(settings.but(initial_state=str(tmp_path / "states.safetensors")))
    recipe = make_recipe(plan, prepare_store(plan))
    recipe()
    save_file({"input_states": np.zeros((9, 25, 32), np.float32)}, tmp_path / "states.safetensors")
    with pytest.raises(RecipeError, match="not the file that the capture was planned with"):
        recipe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"unit_limit_s": 0.0, "workers": 1}, "unit_limit_s must be above 0 seconds, got 0.0"),
        ({"unit_limit_s": 5.0}, "unit_limit_s needs workers that can be killed: give --workers 1 or more"),
        ({"ray_address": "a:1"}, "ray_address a:1 is for --engine ray, which was not given"),
        ({"worker_wait_s": -1.0}, "worker_wait_s must be above 0 seconds, got -1.0"),
    ],
)
def test_settings_that_make_no_sense(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(settings.but(**changes))
    assert not settings.run.store.exists()


def test_gpus_are_checked_where_they_are_needed(settings):
    """This machine may have any number of GPUs, so the plan says that it runs on them."""
    with pytest.raises(PlanError, match="device cuda:99 is not there"):
        make_plan(settings.but(device="cuda:99"))
    plan = replace(make_plan(settings), device="cuda")
    with (
        pytest.raises(EngineError, match=r"--workers 999: torch sees \d+ GPUs, and each worker takes one"),
        open_engine(replace(plan, settings=settings.but(workers=999))),
    ):
        pass
    indexed = replace(plan, device="cuda:1", settings=settings.but(workers=1))
    with (
        pytest.raises(EngineError, match="workers take a GPU each; give --device cuda"),
        open_engine(indexed),
    ):
        pass
    assert make_plan(settings.but(device="cuda", engine="ray")).device == "cuda", "it may be elsewhere"


DRIVER = """
import sys
from pathlib import Path
from threading import Thread
from looptap.capture.engines.drive import run_on
from looptap.capture.engines.processes import Processes
from looptap.tests.engine_contract import Files
hangs = sys.argv[2] == "hangs"
files = Files(Path(sys.argv[1]), hangs=hangs, long=frozenset() if hangs else frozenset(range(9)))
with Processes(files, 2) as pool:
    list(run_on(pool, range(9), committed=files.committed))
"""


@pytest.mark.parametrize("how", ["sleeps", "hangs"])
@pytest.mark.slow
def test_workers_die_with_their_driver(tmp_path, how):
    """They die even if no thread of theirs could notice that the pipe has ended."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), how])
    files = Files(tmp_path)
    while len(files.workers()) < 2:
        assert driver.poll() is None
        time.sleep(0.05)
    assert all(map(is_alive, files.workers()))
    driver.kill()
    driver.wait()
    end_s = time.monotonic() + 30
    while any(map(is_alive, files.workers())) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not any(map(is_alive, files.workers()))


@pytest.mark.slow
def test_ray_is_never_imported_by_the_local_engine(settings, tmp_path):
    """R4, in this process and with workers; seen from a fresh Python."""
    code = f"""
import sys
from pathlib import Path
from threading import Thread
from looptap.capture.plan import make_plan
from looptap.capture.run import run_capture
from looptap.capture.settings import CaptureSettings
for workers in (None, 1):
    settings = CaptureSettings.of(
        model={TINY!r}, data=Path({str(settings.data.data)!r}), unit_tokens=48, limit=2, workers=workers,
        store=Path({str(tmp_path)!r}) / f"{{workers}}.zarr",
    )
    assert run_capture(make_plan(settings)).complete
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
