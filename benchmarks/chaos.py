"""S12: a capture whose processes are killed at random moments, on a disk that is slow and at times full.

Two captures of one plan: one left in peace, one under attack until so many processes were killed, then left
to finish. What must hold at the end: every unit is there once, every file is what its ledger entry says, and
all values are bit for bit those of the calm capture.

The attack, all of it from outside and drawn from one seed:
- SIGKILL of a random worker of the driver, or of the driver itself, which then is started again;
- orphans: processes that hold a worker of the same store, belong to no driver and take any unit that is not
  committed, as workers do whose driver's machine was lost. They are paused (SIGSTOP) in the middle of
  whatever they do and go on late, beside the driver's workers and after it was killed;
- a full disk: the limit on file sizes of a running process is set to next to nothing for a moment (prlimit);
  it gets EFBIG where it would get ENOSPC, and looptap takes both for a full disk;
- a slow disk: in all of them fsync and writing wait up to some tens of milliseconds (a `sitecustomize` on
  PYTHONPATH wraps both).
"""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .goals import Figure
from .store_faults import find_faults

# a drawn initial state, gaps, attention and kept states: everything that a unit can hold
MODEL = "random:(0,2x3,0)I,width=32,heads=2"
UNIT_TOKENS = 48
NUM_WORKERS = 3
NUM_ORPHANS = 2

_SLOW_DISK = """
import os, random, time
_fsync, _pwrite, _random = os.fsync, os.pwrite, random.Random(os.getpid())
def fsync(descriptor):
    time.sleep(_random.choice([0, 0, 0.001, 0.02]) * _random.random())
    return _fsync(descriptor)
def pwrite(*arguments):
    time.sleep(_random.choice([0, 0, 0.001, 0.02]) * _random.random())
    return _pwrite(*arguments)
os.fsync, os.pwrite = fsync, pwrite
"""


@dataclass
class Tally:
    """The result of an attack: what it did and what it left."""

    num_units: int
    kills: Counter[str] = field(default_factory=Counter)
    """Kills by kind of process: worker, driver, orphan."""
    in_flight: int = 0
    """Kills that fell while some attempt had files staged."""
    full_disks: int = 0
    pauses: int = 0
    drivers: int = 0
    attempts: int = 0
    orphan_commits: int = 0
    """Units that a process committed which no driver had sent."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with the finished store; empty if nothing is."""
    seconds: float = 0.0


def measure(settings: Any) -> list[Figure]:
    """S12 for `looptap bench store`."""
    with tempfile.TemporaryDirectory(dir=settings.directory) as directory:
        tally = attack(Path(directory), settings.kills)
    by_whom = ", ".join(f"{count} {whom}" for whom, count in sorted(tally.kills.items()))
    detail = (
        f"kills: {by_whom}; {tally.in_flight} with files staged; {tally.full_disks} full disks, "
        f"{tally.pauses} pauses, {tally.drivers} drivers, {tally.attempts} attempts at {tally.num_units} "
        f"units, {tally.orphan_commits} committed by orphans; {tally.seconds:.0f} s"
        + "".join(f"; {fault}" for fault in tally.faults)
    )
    return [
        Figure(
            name="S12",
            what=f"faults after {tally.kills.total()} kills: lost, torn, twice, other values",
            seen=len(tally.faults),
            must=0,
            better="lower",
            detail=detail,
        )
    ]


def attack(directory: Path, num_kills: int, seed: int = 0) -> Tally:
    """Runs both captures and compares them.

    Args:
        directory: an empty one; both stores stay there.
        num_kills: processes to kill, at least so many, before the capture may finish; what has not gone
            wrong until then does after it.
    """
    from ..capture.store.keys import ATTEMPTS
    from ..capture.store.writing.commit import Store

    started_s = time.perf_counter()
    num_units = 16 * num_kills + 80
    rows = np.random.default_rng(seed).integers(0, 256, (num_units, UNIT_TOKENS // 2 + 1))
    np.save(directory / "ids.npy", rows)  # each row is just over half a unit, and so a unit of its own
    slow_dir = directory / "slow"
    slow_dir.mkdir()
    (slow_dir / "sitecustomize.py").write_text(_SLOW_DISK)
    _Driver(directory, "calm.zarr", slow=False).finish()
    tally = Tally(num_units)
    orphans = _Attack(directory, num_kills, random.Random(seed), tally).run()
    store = Store.open(directory / "run.zarr")
    tally.attempts = len(os.listdir(store.path / ATTEMPTS))
    tally.orphan_commits = sum(entry["pid"] in orphans for entry in store.entries())
    tally.faults = find_faults(directory / "run.zarr", directory / "calm.zarr")
    tally.seconds = time.perf_counter() - started_s
    return tally


class _Driver:
    """A `looptap capture`; under attack, on a slow disk, with workers of its own."""

    def __init__(self, directory: Path, store: str, *, slow: bool = True):
        self._log_path = directory / f"{store}.log"
        command = ["capture", MODEL, "--data", str(directory / "ids.npy"), "--store", str(directory / store)]
        command += ["--unit-tokens", str(UNIT_TOKENS), "--states", "core[all]@last", "--tokens", "last"]
        if slow:  # in peace one process is enough, and its values are those of any
            command += ["--workers", str(NUM_WORKERS)]
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "looptap", *command],
                env=_environment(directory, slow=slow),
                stdout=log,
                stderr=log,
            )

    def workers(self) -> list[psutil.Process]:
        """Processes that the driver started to run units; a new one counts as soon as it is there."""
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "engines.child" in _command(child)]
        return []

    def finish(self) -> None:
        code = self.process.wait()
        if code:
            raise RuntimeError(f"a capture left in peace ended with {code}:\n{self._log_path.read_text()}")


class _Attack:
    def __init__(self, directory: Path, num_kills: int, moments: random.Random, tally: Tally):
        self._directory, self._num_kills, self._moments, self._tally = directory, num_kills, moments, tally
        self._path = directory / "run.zarr"
        self._orphans: list[subprocess.Popen] = []
        self._orphan_pids: set[int] = set()
        self._driver = self._start_driver()

    def run(self) -> set[int]:
        """Runs the whole capture; returns the process numbers of the orphans."""
        try:
            while self._tally.kills.total() < self._num_kills or self._missing():
                self._wait()
                if self._driver.process.poll() is not None:
                    if len(self._ledger()) == self._tally.num_units:
                        raise RuntimeError("the capture was complete before all kills were made: more units")
                    self._driver = self._start_driver()  # the disk was full for it
                    continue
                self._strike()
            for orphan in self._orphans:
                orphan.send_signal(signal.SIGCONT)
            if self._driver.process.wait():  # a last full disk
                self._start_driver().finish()
        finally:
            for process in [*self._orphans, self._driver.process]:
                process.kill()
                process.wait()
        return self._orphan_pids

    def _missing(self) -> list[str]:
        """Returns what must go wrong once and has not yet."""
        tally = self._tally
        seen = {"worker": tally.kills["worker"], "driver": tally.kills["driver"]}
        seen |= {"full": tally.full_disks, "pause": tally.pauses}
        return [what for what, times in seen.items() if not times]

    def _strike(self) -> None:
        """Lets one thing go wrong."""
        self._orphans = [orphan for orphan in self._orphans if orphan.poll() is None]
        if self._path.exists() and len(self._orphans) < NUM_ORPHANS and self._moments.random() < 0.3:
            self._orphans.append(orphan := self._start_orphan())
            self._orphan_pids.add(orphan.pid)
        kinds, weights = ["worker", "driver", "orphan", "full", "pause"], [10, 3, 2, 5, 4]
        if self._tally.kills.total() >= self._num_kills:
            kinds, weights = self._missing(), None
        what = self._moments.choices(kinds, weights)[0]
        workers = self._driver.workers()
        if what == "worker" and workers:
            self._kill("worker", self._moments.choice(workers))
        elif what == "driver":
            self._kill("driver", self._driver.process)
            self._driver.process.wait()
            self._driver = self._start_driver()
        elif what == "orphan" and self._orphans:
            self._kill("orphan", orphan := self._moments.choice(self._orphans))
            orphan.wait()
        elif what == "full" and workers:
            self._fill_disk(self._moments.choice(workers).pid)
        elif what == "pause" and self._orphans:
            orphan = self._moments.choice(self._orphans)
            paused = psutil.Process(orphan.pid).status() == psutil.STATUS_STOPPED
            orphan.send_signal(signal.SIGCONT if paused else signal.SIGSTOP)
            self._tally.pauses += not paused

    def _kill(self, whom: str, process: psutil.Process | subprocess.Popen) -> None:
        staging_dir = self._path / ".looptap" / "staging"
        self._tally.in_flight += staging_dir.exists() and any(staging_dir.iterdir())
        with suppress(psutil.NoSuchProcess):
            process.kill()
            self._tally.kills[whom] += 1

    def _fill_disk(self, pid: int) -> None:
        """Every write of the process fails for a moment."""
        with suppress(ProcessLookupError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (16, hard))
            self._tally.full_disks += 1
            time.sleep(0.2 * self._moments.random())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    def _wait(self) -> None:
        """Waits until a few more units are committed, or for some time; so kills fall into start-ups too."""
        wanted = len(self._ledger()) + self._moments.randint(1, 8)
        end_s = time.monotonic() + self._moments.choice([0.5, 3.0, 30.0]) * self._moments.random()
        while len(self._ledger()) < wanted and time.monotonic() < end_s:
            if self._driver.process.poll() is not None:
                return
            time.sleep(0.002)
        time.sleep(0.05 * self._moments.random())

    def _ledger(self) -> list[str]:
        return os.listdir(self._path / ".looptap" / "ledger") if self._path.exists() else []

    def _start_driver(self) -> _Driver:
        self._tally.drivers += 1
        return _Driver(self._directory, "run.zarr")

    def _start_orphan(self) -> subprocess.Popen:
        with open(self._directory / "orphans.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._path), str(self._moments.random())],
                env=_environment(self._directory, slow=True),
                stdout=log,
                stderr=log,
            )


def _environment(directory: Path, *, slow: bool) -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    if slow:
        paths = [str(directory / "slow"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


def _work_unasked(path: Path, seed: float) -> None:
    """An orphan: units that are not committed, in any order, until none is left or it is killed."""
    from ..capture.models.load import find_model
    from ..capture.store.writing.commit import Store
    from ..capture.worker import Worker

    store = Store.open(path)
    settings = store.plan.settings
    worker = Worker(find_model(MODEL).load(settings.device, settings.dtype), store)
    order = random.Random(seed)
    while todo := store.todo():
        with suppress(OSError):  # taken by others, or the disk is full
            worker.run(order.choice(todo))


if __name__ == "__main__":
    _work_unasked(Path(sys.argv[1]), float(sys.argv[2]))
