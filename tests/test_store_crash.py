"""The store under kill -9, late attempts, two drivers: nothing lost, nothing torn, nothing twice.

Run as a script this file is the capture that gets killed: `test_store_crash.py drive|work PATH SEED`.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.store.care.repair import clean
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import ATTEMPTS, LEDGER, STAGING
from looptap.capture.store.layout import create_store
from looptap.capture.store.places import directory, disk, lease, liveness
from looptap.capture.store.places.lock import driver_lock, lock_holder
from looptap.capture.store.writing.attempt import Attempt, begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.errors import StoreExistsError, StoreLockedError, UnitTakenError
from looptap.tests.small_stores import (
    RECEIPT,
    Killed,
    Turns,
    content,
    leave_files,
    open_or_create,
    write_unit,
)


def check_whole(store: Store, calm: Store) -> None:
    """The store is finished, sound, equal to one written in peace, and no unit was tried after its commit."""
    report = verify_store(store.path)
    assert report.ok and not report.units_missing and not report.uncommitted, report
    for (name, values), wanted in zip(content(store).items(), content(calm).values(), strict=True):
        np.testing.assert_array_equal(values, wanted, err_msg=name)
    last: dict[int, int] = {}
    for file in (store.path / ATTEMPTS).iterdir():
        unit, number = map(int, file.name.split("."))
        last[unit] = max(last.get(unit, 0), number)
    assert {entry["unit"]: entry["attempt"] for entry in store.entries()} == last


@pytest.fixture(scope="module")
def calm_store(tmp_path_factory) -> Callable[[int], Store]:
    stores: dict[int, Store] = {}

    def of_size(num_units: int) -> Store:
        if num_units not in stores:
            stores[num_units] = open_or_create(tmp_path_factory.mktemp("calm") / "run.zarr", num_units)
            for unit in range(num_units):
                write_unit(begin_attempt(stores[num_units], unit)).commit(RECEIPT)
            stores[num_units].finish()
        return stores[num_units]

    return of_size


def start(role: str, path: Path, num_units: int, seed: int = 0) -> subprocess.Popen:
    """A child that has its imports behind it and begins now."""
    child = subprocess.Popen(
        [sys.executable, __file__, role, str(path), str(num_units), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
    return child


def drive(path: Path, num_units: int) -> None:
    """One capture, as its driver does it: create or resume, one unit after the other, finish."""
    print("ready", flush=True)
    store = open_or_create(path, num_units)
    with driver_lock(path):
        clean(store)
        for unit in store.todo():
            write_unit(begin_attempt(store, unit)).commit(RECEIPT)
        store.finish()


def work(path: Path, seed: int) -> None:
    """A worker nobody coordinates: the units in random order, giving way where another was first."""
    print("ready", flush=True)
    store = Store.open(path)
    order = random.Random(seed).sample(range(store.num_units), store.num_units)
    for unit in order:
        with suppress(UnitTakenError):
            write_unit(begin_attempt(store, unit)).commit(RECEIPT)


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [9, pytest.param(24, marks=pytest.mark.full)])
def test_killed_at_random_moments_and_run_again(tmp_path, calm_store, num_kills):
    """Kills from before the store exists to its last unit; the dead are not collected in between."""
    path, num_units, moments = tmp_path / "run.zarr", 300, random.Random(0)
    killed, in_flight = [], 0
    for _ in range(num_kills):
        child = start("drive", path, num_units)
        time.sleep(moments.choice([0.001, 0.01, 0.1]) * moments.random())
        child.send_signal(signal.SIGKILL)
        killed.append(child)
        if path.exists():
            in_flight += any(os.listdir(path / ".looptap" / "staging"))
    last = start("drive", path, num_units)
    assert last.wait() == 0
    assert {child.wait() for child in killed} <= {-signal.SIGKILL, 0}
    assert in_flight >= num_kills / 9, "the kills hit nothing in flight: this test proves nothing"
    check_whole(Store.open(path), calm_store(num_units))
    assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]  # nothing half made beside it


@pytest.mark.slow
def test_uncoordinated_workers_killed_at_random(tmp_path, calm_store):
    """Three workers race for every unit, are killed and replaced; whoever commits, the content is one."""
    num_units, moments = 120, random.Random(1)
    store = open_or_create(tmp_path / "run.zarr", num_units)
    for round_ in range(4):
        workers = [start("work", store.path, num_units, seed=10 * round_ + i) for i in range(3)]
        for worker in workers:
            time.sleep(0.1 * moments.random())
            worker.kill()
            worker.wait()
    clean(store)
    last = [start("work", store.path, num_units, seed=i) for i in (101, 102)]
    assert [worker.wait() for worker in last] == [0, 0]
    for unit in store.todo():  # those the two kept taking from each other
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    report = verify_store(store.path)
    assert report.ok and not report.units_missing and not report.uncommitted, report
    for values, wanted in zip(content(store).values(), content(calm_store(num_units)).values(), strict=True):
        np.testing.assert_array_equal(values, wanted)


@pytest.mark.slow
def test_killed_while_finishing(tmp_path):
    """Every prefix of what `finish` writes, as a kill between two writes leaves it."""
    store = open_or_create(tmp_path / "run.zarr", 3)
    for unit in range(3):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    for stop in range(4):
        steps, really = iter(range(stop)), disk.replace

        def replace(path: Path, data: bytes, steps=steps, really=really) -> None:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            really(path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk, "replace", replace)
            if stop < 3:
                with pytest.raises(KeyboardInterrupt):
                    store.finish()
            else:
                store.finish()
    assert verify_store(store.path).ok and (store.path / ".looptap" / "complete").exists()


def test_a_late_attempt_is_refused(tmp_path):
    store = open_or_create(tmp_path / "run.zarr", 2)
    late, newer = begin_attempt(store, 1), begin_attempt(store, 1)
    assert (late.number, newer.number) == (1, 2)
    write_unit(late, salt=1)
    with pytest.raises(UnitTakenError, match=r"unit 1 of .* has a later attempt: attempt 1 stops"):
        late.commit(RECEIPT)
    entry = write_unit(newer, salt=2).commit(RECEIPT)
    with pytest.raises(UnitTakenError, match="was committed by attempt 2: attempt 1 stops"):
        write_unit(Attempt(store, 1, 1)).commit(RECEIPT)
    with pytest.raises(UnitTakenError, match=r"unit 1 of .* is committed: nothing is left to do"):
        begin_attempt(store, 1)
    assert store.entry(1) == entry and verify_store(store.path).ok and store.todo() == [0]


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("placed", range(5))
def test_an_entry_that_came_too_late(tmp_path, monkeypatch, placed, dies):
    """An attempt pauses before its ledger entry and enters it when a later one has `placed` so many files."""
    store = open_or_create(tmp_path / "run.zarr", 2)
    late = write_unit(begin_attempt(store, 1), salt=1)
    newer_entries, newer_calls, really = [], iter(range(100)), disk.publish

    def publish(source: Path, target: Path) -> None:
        if source.parent != late.draft.path:
            if next(newer_calls) == placed:
                really(
                    late.draft.path / quote(".looptap/ledger/1.json", safe=""), store.path / LEDGER / "1.json"
                )
            return really(source, target)
        if target.parent != store.path / LEDGER:
            return really(source, target)
        with suppress(UnitTakenError):
            newer_entries.append(write_unit(begin_attempt(store, 1), salt=2).commit(RECEIPT))
        if dies:
            raise Killed

    monkeypatch.setattr(disk, "publish", publish)
    with pytest.raises(Killed if dies else UnitTakenError):
        late.commit(RECEIPT)
    if placed == 0:  # nothing was replaced: the entry is true, but who made it cannot know
        assert newer_entries == [] and (store.entry(1) is not None) == dies
        if not dies:
            write_unit(begin_attempt(store, 1), salt=3).commit(RECEIPT)
    else:
        assert newer_entries == [store.entry(1)] and store.entry(1)["attempt"] == 2
    report = verify_store(store.path)
    assert report.ok and report.uncommitted == [], report


def no_links(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])  # without: as vfat and some network mounts
@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.slow
def test_two_attempts_interleaved(tmp_path, monkeypatch, links, kill):
    """100 units, each by two attempts of different content that take turns at every publish and sync."""
    store = open_or_create(tmp_path / "run.zarr", 100)

    def attempt() -> None:
        name = threading.current_thread().name
        begun = write_unit(begin_attempt(store, unit), salt=ord(name))
        committed.append((name, begun.commit(RECEIPT)))

    steps = [(module, step) for module in (disk, directory) for step in ("publish", "sync", "identity")]
    steps = [(module, step, getattr(module, step)) for module, step in steps if hasattr(module, step)]
    if links:  # without, a name that is free when looked at may be taken when the file is renamed to it
        steps.append((os, "rename", os.rename))
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    outcomes = []
    for unit in range(store.num_units):
        turns, committed = Turns(unit, kill), []
        if num_before := unit % 2:
            leave_files(store, unit)
        for module, step, function in steps:
            monkeypatch.setattr(module, step, turns.gated(function))
        turns.run(attempt)
        if kill:  # as the next driver does: what the dead had in their hands goes back
            clean(store)
        entry = store.entry(unit)
        assert len(committed) <= 1 and (not committed or committed[0][1] == entry), (unit, committed, entry)
        if entry:
            assert unit not in {problem.unit for problem in verify_store(store.path).problems}, entry
        outcomes.append((len(committed), entry and entry["attempt"] - num_before))
    # (who came back from commit, whose entry there is): either attempt wins, by turns; killed, also neither,
    # or one that had entered the unit
    assert {(1, 2), (0, None) if kill else (1, 1)} <= set(outcomes), Counter(outcomes)
    assert not kill or {(0, 1), (0, 2)} & set(outcomes), Counter(outcomes)
    for unit in store.todo():
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    assert verify_store(store.path).ok


def test_two_attempts_killed_at_the_worst_moment(tmp_path, monkeypatch):
    """The later one after it replaced a file, the earlier after its entry, before it could see the other."""
    store = open_or_create(tmp_path / "run.zarr", 2)
    late = write_unit(begin_attempt(store, 1), salt=1)
    write_unit(begin_attempt(store, 0)).commit(RECEIPT)
    really = disk.publish

    def publish(source: Path, target: Path) -> None:
        if source.parent == late.draft.path and target.parent == store.path / LEDGER:
            newer = write_unit(begin_attempt(store, 1), salt=2)
            newer.draft.sync()
            newer._put(store.shard_keys("state", 1)[1])
            really(source, target)
            raise Killed
        really(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(disk, "publish", publish)
        late.commit(RECEIPT)
    (problem,) = verify_store(store.path).problems
    assert problem.file == "state/c.3.0.0" and store.todo() == []
    clean(store)  # as the next driver does
    assert store.todo() == [1] and verify_store(store.path).ok
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    store.finish()
    assert verify_store(store.path).ok


def test_paused_just_before_it_takes_a_file_away(tmp_path, monkeypatch):
    """The file was a dead attempt's when it was looked at, and is a committed unit's by now."""
    store, really, entries = open_or_create(tmp_path / "run.zarr", 2), os.rename, []
    leave_files(store, 1)
    late = write_unit(begin_attempt(store, 1), salt=1)

    def rename(source: Path, target: Path) -> None:
        if target.parent == late.draft.path and not entries:
            entries.append(write_unit(begin_attempt(store, 1), salt=2).commit(RECEIPT))
        really(source, target)

    with monkeypatch.context() as patch, pytest.raises(UnitTakenError, match="was committed by attempt 3"):
        patch.setattr(os, "rename", rename)
        late.commit(RECEIPT)
    report = verify_store(store.path)
    assert entries == [store.entry(1)] and report.ok and report.uncommitted == []
    assert not any((store.path / STAGING).glob("1.2"))


def test_an_attempt_that_fails_takes_an_untrue_entry_with_it(tmp_path, monkeypatch):
    """An earlier attempt entered the unit after this one had replaced a file, and was killed."""
    store, really = open_or_create(tmp_path / "run.zarr", 2), disk.publish
    late = write_unit(begin_attempt(store, 1), salt=1)
    newer, num_published = write_unit(begin_attempt(store, 1), salt=2), 0
    late.draft.write(".looptap/ledger/1.json", json.dumps({"unit": 1, "attempt": 1}).encode())

    def publish(source: Path, target: Path) -> None:
        nonlocal num_published
        if num_published == 1:
            really(late.draft.path / quote(".looptap/ledger/1.json", safe=""), store.path / LEDGER / "1.json")
        if num_published == 2:
            raise OSError(errno.EIO, "Input/output error")
        num_published += 1
        really(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(disk, "publish", publish)
        newer.commit(RECEIPT)
    assert num_published == 2 and store.todo() == [0, 1] and verify_store(store.path).uncommitted == []


@pytest.mark.parametrize("step", [0, 1])
def test_files_that_were_swapped_are_not_committed(tmp_path, monkeypatch, step):
    """A late attempt may swap them before the entry or just after it, if names can be overwritten."""
    store = open_or_create(tmp_path / "run.zarr", 2)
    attempt, calls = write_unit(begin_attempt(store, 1)), iter(range(2))
    really, victim = attempt.draft.sync_published, store.path / store.shard_keys("state", 1)[1]

    def swap(keys: Iterable[str]) -> None:
        really(keys)
        if next(calls) == step:
            other = tmp_path / "other"
            other.write_bytes(b"x")
            os.replace(other, victim)

    monkeypatch.setattr(attempt.draft, "sync_published", swap)
    with pytest.raises(UnitTakenError):
        attempt.commit(RECEIPT)
    assert store.todo() == [0, 1] and verify_store(store.path).uncommitted == ["state/c.3.0.0"]


def test_a_file_that_was_taken_away_by_mistake_goes_back(tmp_path):
    """A late attempt was killed with a committed unit's file in its hands."""
    store = open_or_create(tmp_path / "run.zarr", 2)
    late = begin_attempt(store, 1)
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    key = store.shard_keys("state", 1)[0]
    os.rename(store.path / key, late.draft.path / f"aside.{quote(key, safe='')}")
    assert [problem.what for problem in verify_store(store.path).problems] == ["is missing"]
    clean(store)
    assert verify_store(store.path).ok and store.done() == [1] and not any((store.path / STAGING).iterdir())


@pytest.mark.parametrize("error", [errno.EEXIST, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("step", ["link", "rename"])
def test_a_lost_reply_is_success(tmp_path, monkeypatch, step, error):
    """A network file system does what it was asked, and says that it did not, or that it was there before."""
    store, really, num_lost = open_or_create(tmp_path / "run.zarr", 2), getattr(os, step), []

    def lossy(source: Path, target: Path) -> None:
        really(source, target)
        if str(target).startswith(str(store.path)):
            num_lost.append(target)
            raise OSError(error, os.strerror(error), str(target))

    if step == "rename":
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, lossy)
        entry = write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    assert len(num_lost) == 5 and entry["attempt"] == 1  # four files and the entry
    assert store.done() == [1] and verify_store(store.path).ok


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("links", [True, False])
def test_a_disk_that_fails_while_publishing(tmp_path, monkeypatch, links, failing):
    """An error that is true: nothing of the unit stays, and the next attempt goes well."""
    store, calls = open_or_create(tmp_path / "run.zarr", 2), iter(range(100))
    step = "link" if links else "rename"
    really = getattr(os, step)

    def fail(source: Path, target: Path) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        really(source, target)

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, step, fail)
        write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    report = verify_store(store.path)
    assert store.todo() == [0, 1] and report.ok and report.uncommitted == []
    assert not any((store.path / STAGING).iterdir())
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    assert verify_store(store.path).ok and store.done() == [1]


def test_names_of_deleted_open_files_are_no_files(tmp_path):
    """A network file system renames what is deleted while it is open to .nfs and a number."""
    store = open_or_create(tmp_path / "run.zarr", 2)
    for folder in (".looptap/ledger", ".looptap/attempts", "state"):
        (store.path / folder / ".nfs0000000000000001").write_bytes(b"x")
    for unit in range(2):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    report = verify_store(store.path)
    assert report.ok and report.uncommitted == [] and store_status(store.path).attempts == 2


def test_a_driver_keeps_others_out(tmp_path):
    store = open_or_create(tmp_path / "run.zarr", 2)
    with driver_lock(store.path) as held:
        assert held.held and lock_holder(store.path)["pid"] == os.getpid()
        with pytest.raises(
            StoreLockedError, match=rf"written by process {os.getpid()} on {os.uname().nodename}"
        ):
            drive(store.path, 2)
        child = start("drive", store.path, 2)
        assert child.wait() != 0
        assert store.todo() == [0, 1]
    assert lock_holder(store.path) is None
    drive(store.path, 2)
    assert store.todo() == []


@pytest.mark.apart
def test_a_killed_driver_is_succeeded_at_once(tmp_path):
    """Killed, but still in the process table, as a shell or a batch system leaves it."""
    path = tmp_path / "run.zarr"
    child = start("drive", path, 10_000)
    while not (path.exists() and lock_holder(path)):
        time.sleep(0.01)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, not collected
    began = time.perf_counter()
    with driver_lock(path):
        assert time.perf_counter() - began < 1
    child.wait()


def forge_lock(path: Path, silent_s: float, **changes) -> None:
    """The lock of a driver somewhere else, last heard of some time ago."""
    mine = {"host": "elsewhere", "pid": os.getpid(), "process_start": 1, "machine": "0", **changes}
    file = path / ".looptap" / "driver.lock"
    file.write_text(json.dumps(mine))
    os.utime(file, (time.time() - silent_s, time.time() - silent_s))


def test_a_silent_driver_is_succeeded_after_a_minute(tmp_path):
    path = open_or_create(tmp_path / "run.zarr", 2).path
    forge_lock(path, silent_s=50)
    with (
        pytest.raises(StoreLockedError, match=r"on elsewhere \(last sign of life 5\d s ago\)"),
        driver_lock(path),
    ):
        pass
    forge_lock(path, silent_s=61)
    with driver_lock(path):
        pass
    # the process number lives on this machine, but another process has it now
    forge_lock(path, silent_s=0, machine=liveness.machine())
    with driver_lock(path):
        pass


def test_one_of_many_takes_a_lapsed_lock_over(tmp_path):
    path, winners, losers = open_or_create(tmp_path / "run.zarr", 2).path, [], []

    def contend(everyone: threading.Barrier) -> None:
        everyone.wait()
        try:
            with driver_lock(path):
                winners.append(1)
                everyone.wait()
        except StoreLockedError:
            losers.append(1)
            everyone.wait()

    for _ in range(20):
        forge_lock(path, silent_s=100)
        everyone = threading.Barrier(8)
        threads = [threading.Thread(target=contend, args=[everyone]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(winners), len(losers)) == (20, 140)
    assert {p.name for p in (path / ".looptap").glob("driver.*")} == {"driver.guard"}


def test_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    path = open_or_create(tmp_path / "run.zarr", 2).path
    file = path / ".looptap" / "driver.lock"
    with driver_lock(path) as held:
        first = file.stat().st_mtime_ns
        time.sleep(0.3)
        assert file.stat().st_mtime_ns > first
        file.unlink()  # as a successor does that thought this one dead
        forge_lock(path, silent_s=0)
        assert not held.held
        time.sleep(0.1)
    assert json.loads(file.read_bytes())["host"] == "elsewhere"  # not ours to remove


def test_two_builders_of_one_store(tmp_path):
    """One wins; the other says so and leaves nothing. A dead builder's leftovers go, a living one's stay."""
    prefix = directory._new_path(tmp_path / "run.zarr").name.rsplit("-", 2)[0]
    living = tmp_path / f"{prefix}-{os.getppid()}-{liveness.process_start(os.getppid())}"
    dead, strange = tmp_path / f"{prefix}-{os.getpid()}-1", tmp_path / f"{prefix}-x-1"
    for path in (living, dead, strange):
        path.mkdir()
    open_or_create(tmp_path / "run.zarr", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"run.zarr", living.name, strange.name}
    with pytest.raises(StoreExistsError):
        create_store(tmp_path / "run.zarr", plan=bare_plan(2), coordinates={}, arrays={})


if __name__ == "__main__":
    role, store_path, number, seed = sys.argv[1:]
    if role == "drive":
        drive(Path(store_path), int(number))
    else:
        work(Path(store_path), int(seed))
