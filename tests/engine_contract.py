"""What every pool of workers must do, whoever its workers are: the tests of one are those of all.

Units here are not captures but files in a directory, which plays the ledger: what was begun, how often, and
what is committed can be looked at from outside. Units of certain numbers fail in one way or another.
"""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from looptap.capture.engines.drive import run_on
from looptap.capture.engines.events import Receipt, SlowUnit, UnitDone, UnitFailed, WorkerJoined, WorkerLost
from looptap.capture.engines.patience import Limits
from looptap.capture.engines.work import Recipe, RunUnit
from looptap.errors import NoWorkersError, StoreFullError, StoreRefusedError

QUICK = Limits(reissue_s=0.5, lost_s=1.5)


@dataclass(frozen=True)
class Files:
    """A recipe whose units are files."""

    directory: Path
    seconds: float = 0.0
    """Seconds that a unit takes."""
    raises: dict[int, int] = field(default_factory=dict)
    """Unit -> how many times."""
    kills: dict[int, int] = field(default_factory=dict)
    """Unit -> how many of its workers it kills."""
    dies_done: frozenset[int] = frozenset()
    """Units that kill their worker just after they are committed."""
    refused: dict[int, type[StoreRefusedError]] = field(default_factory=dict)
    """Units for which the store has no room, or cannot be written."""
    long: frozenset[int] = frozenset()
    """Units that take a minute."""
    hangs: bool = False
    """Units never end, and let no other thread of their process run."""
    freezes: dict[int, int] = field(default_factory=dict)
    """Unit -> how many of its workers it stops for good, as SIGSTOP does. A unit may then be done twice."""
    waits: bool = False
    """Units go on once there is a file `go`."""
    waits_after: int | None = None
    """Unit after whose end all others wait for it."""
    cannot: str | None = None
    """Why no worker can be made."""

    def __call__(self) -> RunUnit:
        if self.cannot is not None:
            raise ValueError(self.cannot)
        return self.run

    def run(self, unit: int) -> Receipt:
        number = len(list(self.directory.glob(f"begun.{unit}.*"))) + 1
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
        (self.directory / f"begun.{unit}.{number}").write_text(f"{os.getpid()} {gpus}")
        time.sleep(60 if unit in self.long else self.seconds)
        if self.hangs:
            re.match(r"(a+)+$", "a" * 64 + "b")  # it tries 2**64 ways
        waits = self.waits or (self.directory / f"done.{self.waits_after}").exists()
        while waits and not (self.directory / "go").exists():
            time.sleep(0.01)
        if number <= self.kills.get(unit, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if number <= self.freezes.get(unit, 0):
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)  # another thread may get it, a little later
        if number <= self.raises.get(unit, 0):
            raise RuntimeError(f"unit {unit} raises for the {number}th time")
        if unit in self.refused:
            raise self.refused[unit](f"unit {unit} cannot be written")
        (self.directory / f"done.{unit}").touch(exist_ok=bool(self.freezes))  # twice would be an error
        if unit in self.dies_done:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.committed(unit)

    def committed(self, unit: int) -> Receipt | None:
        return Receipt(num_tokens=unit + 1) if (self.directory / f"done.{unit}").exists() else None

    def times_begun(self) -> Counter[int]:
        return Counter(int(path.name.split(".")[1]) for path in self.directory.glob("begun.*"))

    def done(self) -> set[int]:
        return {int(path.name.split(".")[1]) for path in self.directory.glob("done.*")}

    def workers(self) -> set[int]:
        """Processes that ran something."""
        return set(self.gpus())

    def gpus(self) -> dict[int, str]:
        """What each of them was shown."""
        begun = [path.read_text().split() for path in self.directory.glob("begun.*")]
        return {int(pid): shown for pid, shown in filter(None, begun)}


class Threads:
    """A recipe whose receipts say, as tokens, how many threads torch has."""

    def __call__(self) -> RunUnit:
        import torch

        return lambda unit: Receipt(num_tokens=torch.get_num_threads())


MakePool = Callable[[Recipe, int], Any]  # a pool and a context manager


def run(make_pool: MakePool, files: Files, num_units: int, num_workers: int = 2, **more):
    """All events, in order."""
    more = {"limits": QUICK, "wanted": num_workers, **more}
    with make_pool(files, num_workers) as pool:
        return list(run_on(pool, range(num_units), committed=files.committed, **more))


def ended(events) -> dict[int, str]:
    """Unit -> done or failed; each must end once."""
    found = [event for event in events if isinstance(event, (UnitDone, UnitFailed))]
    assert len({event.unit for event in found}) == len(found)
    return {event.unit: "done" if isinstance(event, UnitDone) else "failed" for event in found}


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class PoolContract:
    """The contract of any pool; `make_pool` is a fixture of the subclass."""

    limits = QUICK

    def test_every_unit_is_done_once(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path)
        events = run(make_pool, files, 23, limits=self.limits)
        assert ended(events) == dict.fromkeys(range(23), "done")
        assert files.times_begun() == Counter(range(23))
        assert {event.unit: event.receipt for event in events if isinstance(event, UnitDone)} == {
            unit: Receipt(num_tokens=unit + 1) for unit in range(23)
        }

    def test_no_units(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path)
        assert run(make_pool, files, 0, limits=self.limits) == []

    def test_a_unit_that_raises_is_tried_three_times(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, raises={2: 2, 4: 9})
        events = run(make_pool, files, 7, limits=self.limits)
        assert ended(events) == {**dict.fromkeys(range(7), "done"), 4: "failed"}
        assert files.times_begun() == {0: 1, 1: 1, 2: 3, 3: 1, 4: 3, 5: 1, 6: 1}
        (failed,) = [event for event in events if isinstance(event, UnitFailed)]
        assert "Traceback" in failed.error and "unit 4 raises for the 3th time" in failed.error

    @pytest.mark.parametrize("kind", [StoreFullError, StoreRefusedError])
    def test_a_store_that_refuses_ends_the_run(self, make_pool: MakePool, tmp_path, kind):
        """At once: what waits behind the refused unit is not begun, and nothing is begun a second time."""
        files = Files(tmp_path, refused=dict.fromkeys(range(3, 99), kind), seconds=0.02)
        with pytest.raises(StoreRefusedError, match=r"^unit \d+ cannot be written$") as refused:
            run(make_pool, files, 99, limits=self.limits)
        assert type(refused.value) is kind and files.done() <= {0, 1, 2}
        begun = files.times_begun()
        assert set(begun.values()) == {1} and len(set(begun) - files.done()) <= 2, "more than one a worker"

    def test_a_run_that_is_told_to_stop_finishes_what_it_began(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, seconds=0.1)
        events = run(make_pool, files, 99, limits=self.limits, goes_on=lambda: len(files.done()) < 5)
        done = [unit for unit, how in ended(events).items() if how == "done"]
        assert 5 <= len(done) < 60
        assert files.done() == set(done) == set(files.times_begun())

    def test_what_the_watcher_raises_ends_the_run(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, seconds=0.05)

        def lost_the_lock() -> bool:
            if len(files.done()) >= 3:
                raise OSError("another run took it")
            return True

        with pytest.raises(OSError, match="another run took it"):
            run(make_pool, files, 99, limits=self.limits, goes_on=lost_the_lock)
        assert 3 <= len(files.done()) < 90


class ProcessPoolContract(PoolContract):
    """The contract of pools whose workers are processes of their own, so that they can die."""

    def test_what_waits_behind_a_running_unit_is_given_back(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, waits=True)

        def two_are_running() -> bool:
            if len(files.times_begun()) < 2:
                return True
            # the workers hear of the end long before what they run ends
            Timer(1.5, (tmp_path / "go").touch).start()
            return False

        events = run(make_pool, files, 9, goes_on=two_are_running)
        assert len(ended(events)) == 2 and files.done() == set(files.times_begun()) == set(ended(events))

    def test_units_of_a_worker_that_dies_go_to_others(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, kills={1: 1, 5: 2}, seconds=0.02)
        events = run(make_pool, files, 12)
        assert ended(events) == dict.fromkeys(range(12), "done")
        lost = [event for event in events if isinstance(event, WorkerLost)]
        assert sorted(event.unit for event in lost) == [1, 5, 5]
        assert files.times_begun()[1] == 2 and files.times_begun()[5] == 3
        # what waited behind them had not begun
        assert all(files.times_begun()[unit] == 1 for unit in set(range(12)) - {1, 5})

    def test_a_unit_that_kills_three_workers_has_failed(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, kills={1: 99})
        events = run(make_pool, files, 4, 1)
        assert ended(events) == {0: "done", 1: "failed", 2: "done", 3: "done"}
        assert files.times_begun() == {0: 1, 1: 3, 2: 1, 3: 1}

    def test_what_a_dying_worker_committed_is_not_done_again(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, dies_done=frozenset({0, 3}))
        events = run(make_pool, files, 5, 1)
        assert ended(events) == dict.fromkeys(range(5), "done")
        assert files.times_begun() == Counter(range(5))

    def test_a_unit_is_done_though_it_killed_its_third_worker(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, kills={1: 2}, dies_done=frozenset({1}))
        assert ended(run(make_pool, files, 3, 1)) == dict.fromkeys(range(3), "done")
        assert files.times_begun()[1] == 3

    def test_a_unit_past_the_limit_loses_its_worker(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, long=frozenset({2}))
        events = run(make_pool, files, 4, 1, limits=Limits(unit_limit_s=0.7))
        assert ended(events) == {0: "done", 1: "done", 2: "failed", 3: "done"}
        lost = [event for event in events if isinstance(event, WorkerLost)]
        assert [(event.unit, event.why) for event in lost] == [(2, "unit 2 took longer than 0.7 s")] * 3

    def test_a_frozen_worker_is_given_up_and_another_started(self, make_pool: MakePool, tmp_path):
        """Its unit is done by the other worker, what waited behind it too; nothing counts as a failure."""
        files, events = Files(tmp_path, freezes={9: 1}, seconds=0.1, waits_after=9), []
        limits = Limits(slow_s=4, grace_s=0.5)
        with make_pool(files, 2) as pool:
            for event in run_on(pool, range(150), committed=files.committed, limits=limits, wanted=2):
                events.append(event)
                if sum(isinstance(event, WorkerJoined) for event in events) == 3:
                    (tmp_path / "go").touch()
        assert ended(events) == dict.fromkeys(range(150), "done")
        frozen = int((tmp_path / "begun.9.1").read_text().split()[0])
        assert files.times_begun()[9] >= 2 and not is_alive(frozen)
        slow = [event for event in events if isinstance(event, SlowUnit)]
        lost = [event for event in events if isinstance(event, WorkerLost)]
        assert slow[0].unit == 9 and [event.unit for event in lost] == [9]

    def test_a_worker_that_is_frozen_alone_is_replaced(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, freezes={6: 1})
        events = run(make_pool, files, 9, 1, limits=Limits(slow_s=2, frozen_s=4))
        assert ended(events) == dict.fromkeys(range(9), "done")
        assert [event.unit for event in events if isinstance(event, WorkerLost)] == [6]
        assert len(files.workers()) == 2 and files.times_begun()[6] == 2

    def test_a_run_that_is_to_stop_does_not_wait_for_a_frozen_worker(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, freezes={6: 9})
        limits = Limits(slow_s=2)
        events = run(
            make_pool, files, 9, 1, limits=limits, goes_on=lambda: not (tmp_path / "begun.6.1").exists()
        )
        assert ended(events) == dict.fromkeys(range(6), "done") and files.times_begun()[6] == 1

    def test_workers_that_cannot_be_made_end_the_run(self, make_pool: MakePool, tmp_path):
        files = Files(tmp_path, cannot="weights_sha256 differs")
        with pytest.raises(NoWorkersError, match=r"no worker could be started in .*weights_sha256 differs"):
            run(make_pool, files, 3)

    def test_nothing_is_left_of_it(self, make_pool: MakePool, tmp_path):
        """Even when it is left in the middle, with a unit of a minute under way."""
        files = Files(tmp_path, long=frozenset({3}))
        with make_pool(files, 2) as pool:
            for _ in run_on(pool, range(9), committed=files.committed, limits=QUICK, wanted=2):
                if files.times_begun()[3]:
                    break
        end_s = time.monotonic() + 20
        while any(map(is_alive, files.workers())) and time.monotonic() < end_s:
            time.sleep(0.05)
        assert files.workers() and not any(map(is_alive, files.workers()))
