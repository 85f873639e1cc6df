"""Disks that fill up, or cannot be written any more, while a capture runs: one message, no unit computed for
nothing but the one that met it, and the same command goes on once there is room.

Errors are raised in place of system calls, and disks are real where a tmpfs may be mounted.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from looptap.capture.engines.events import UnitDone
from looptap.capture.plan import make_plan
from looptap.capture.run import run_capture
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import ATTEMPTS, STAGING
from looptap.capture.store.places import lease
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.capture.worker import Worker
from looptap.errors import StoreFullError, StoreRefusedError
from looptap.tests.small_stores import RECEIPT, open_or_create, write_unit

NUM_UNITS = 5
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES)


@pytest.fixture
def settings(tmp_path) -> CaptureSettings:
    """Five units that hold everything which a unit can."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 256, (NUM_UNITS, 25)))
    return CaptureSettings.of(
        model="random:(0,2x3,0)I,width=32,heads=2", data=tmp_path / "ids.npy", store=tmp_path / "run.zarr",
        unit_tokens=48, states=("core[all]@last",),
    )  # fmt: skip


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The units that went through the model, each time that they did."""
    units, really = [], Worker._measure

    def measure(self, unit, *arguments):
        units.append(unit)
        return really(self, unit, *arguments)

    monkeypatch.setattr(Worker, "_measure", measure)
    return units


def num_attempts(store: Store) -> int:
    return sum(name[0] != "." for name in store.place.names(ATTEMPTS))


def check_goes_on(settings: CaptureSettings, monkeypatch) -> None:
    """The same capture once more, on a sound disk."""
    monkeypatch.setattr(lease, "STALE_S", 0.0)  # a read-only disk keeps a lock of this process
    path = Path(settings.run.store)
    before = Store.open(path).done()
    outcome = run_capture(make_plan(settings))
    assert outcome.complete and outcome.num_resumed == len(before)
    report = verify_store(path)
    assert report.ok and not report.units_missing and not report.uncommitted, report
    assert not any((path / STAGING).iterdir())


class Fault:
    """System calls on a store fail once two units are committed.

    Args:
        skipped: how many calls of `name` go well after that.
        stays: whether every call that writes fails from then on, as on a disk that became read-only.
    """

    WRITING = ("open", "write", "pwrite", "link", "fsync", "mkdir", "replace", "unlink")

    def __init__(self, store: Path, name: str, code: int, skipped: int, stays: bool):
        self.store, self.name, self.code, self.skipped, self.stays = store, name, code, skipped, stays
        self.is_armed = self.has_struck = False

    def patch(self, monkeypatch) -> None:
        for name in self.WRITING:
            monkeypatch.setattr(os, name, self.faulty(name, getattr(os, name)))

    def faulty(self, name: str, really: Callable) -> Callable:
        def call(what, *arguments, **options):
            if self.is_armed and self.is_of_store(what) and self.strikes(name, arguments):
                raise OSError(self.code, os.strerror(self.code), str(what))
            return really(what, *arguments, **options)

        return call

    def is_of_store(self, what: object) -> bool:
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        return str(path).startswith(str(self.store))

    def strikes(self, name: str, arguments: tuple) -> bool:
        if name == "open" and arguments[0] == os.O_RDONLY and self.code != errno.EACCES:
            return False  # to open for reading takes no room
        if self.has_struck:
            return self.stays and (name != "unlink" or self.code in REFUSED)
        if name != self.name:
            return False
        self.skipped -= 1
        self.has_struck = self.skipped < 0
        return self.has_struck

    def watch(self, event: object) -> None:
        done = len(os.listdir(self.store / ".looptap" / "ledger"))
        self.is_armed = isinstance(event, UnitDone) and done >= 2


# where in a unit each call fails: the first ones are those of the attempt's beginning, the last ones those of
# its commit, or of the unit after it
POINTS = [
    *(("open", skipped) for skipped in (0, 1, 2, 5, 11, 20, 33)),
    *(("pwrite", skipped) for skipped in (0, 3, 9)),
    *(("write", skipped) for skipped in (0, 1)),
    *(("link", skipped) for skipped in (0, 1, 7, 13)),
    *(("fsync", skipped) for skipped in (0, 1, 2, 8, 17, 24)),
    ("mkdir", 0),
]
CASES = [
    pytest.param(name, skipped, code, stays, marks=pytest.mark.slow if skipped or not stays else ())
    for index, (name, skipped) in enumerate(POINTS)
    for code, stays in zip((*FULL, *REFUSED), (True, False, False, True), strict=True)
    if skipped == 0 or (code in FULL) == index % 2
]


@pytest.mark.parametrize(("name", "skipped", "code", "stays"), CASES)
@pytest.mark.slow
def test_the_first_refusal_ends_the_run(settings, computed, monkeypatch, name, skipped, code, stays):
    fault = Fault(Path(settings.run.store), name, code, skipped, stays)
    with monkeypatch.context() as patch:
        fault.patch(patch)
        with pytest.raises(StoreRefusedError) as refused:
            run_capture(make_plan(settings), fault.watch)
    assert fault.has_struck
    assert isinstance(refused.value, StoreFullError) == (code in FULL)
    assert os.strerror(code) in str(refused.value)
    store = Store.open(settings.run.store)
    num_done = len(store.done())
    assert 2 <= num_done < NUM_UNITS and num_attempts(store) <= num_done + 1
    assert computed == list(range(len(computed))) and len(computed) <= num_done + 1
    check_goes_on(settings, monkeypatch)


def room(path: Path, **changes: int) -> os.statvfs_result:
    """A disk's figures with some of them changed."""
    names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail")
    real = os.statvfs(path)
    values = {name: getattr(real, name) for name in (*names, "f_flag", "f_namemax")} | changes
    return os.statvfs_result(values.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f_frsize": 1, "f_bavail": 5000}, r"no room left to write unit 2 .* up to 0\.\d MB, 0\.0 MB are"),
        ({"f_files": 100, "f_favail": 4}, r"unit 2 .* needs \d\d files, and the file system can make 4 more"),
    ],
    ids=["bytes", "files"],
)  # fmt: skip
def test_a_unit_without_room_is_not_begun(settings, computed, monkeypatch, changes, message):
    path = Path(settings.run.store)
    with monkeypatch.context() as patch:
        figures = room(path.parent, **changes)

        def full(event):
            if isinstance(event, UnitDone) and event.unit == 1:
                patch.setattr(os, "statvfs", lambda _: figures)

        with pytest.raises(StoreFullError, match=message):
            run_capture(make_plan(settings), full)
    store = Store.open(path)
    assert store.done() == computed == [0, 1] and num_attempts(store) == 2
    check_goes_on(settings, monkeypatch)


def test_file_systems_that_do_not_count(settings, monkeypatch):
    """Blocks and inodes are 0 of 0 where there is no limit, or nobody knows."""
    path = Path(settings.run.store)
    figures = room(path.parent, f_blocks=0, f_bfree=0, f_bavail=0, f_files=0, f_ffree=0, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda _: figures)
    assert run_capture(make_plan(settings)).complete


def test_room_is_counted_by_what_a_unit_fills(settings):
    """Slots for sequences that no sequence fills take no room, nor do tokens past the last."""
    plan = make_plan(settings)
    run_capture(plan)
    store, asked = Store.open(plan.store), []
    store.place.check_room = lambda task, needed_bytes, num_files: asked.append((needed_bytes, num_files))
    store.check_room(0, {"token": 25, "sequence": 1})
    store.check_room(0, {})
    (filled, num_files), (whole, _) = asked
    assert filled < 0.6 * whole and whole == store.unit_bytes
    committed = [shard for shards in store.entry(0)["shards"].values() for shard in shards]
    assert num_files == len(committed) + 3


def failing(self, *_: object) -> None:
    raise RuntimeError("the model broke")


def test_a_note_that_cannot_be_written_hides_no_error(settings, monkeypatch):
    """An error of the disk that says nothing of room: the unit's own error is reported, with the other."""
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_measure", failing)
        patch.setattr(os, "replace", raising(os.replace, errno.EIO, ATTEMPTS))
        outcome = run_capture(make_plan(settings))
    assert len(outcome.failures) == NUM_UNITS
    for failure in outcome.failures:
        assert "RuntimeError: the model broke\nthis could not be noted in the store" in failure.error
        assert "Input/output error" in failure.error
    assert not [name for name in os.listdir(settings.run.store / ATTEMPTS) if name[0] == "."]
    check_goes_on(settings, monkeypatch)


def test_a_full_disk_under_a_note_ends_the_run_and_hides_no_error(settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_measure", failing)
        patch.setattr(os, "replace", raising(os.replace, errno.ENOSPC, ATTEMPTS))
        message = r"why unit 0 failed \(RuntimeError: the model broke\).*No space left on device"
        with pytest.raises(StoreFullError, match=message):
            run_capture(make_plan(settings))
    assert num_attempts(Store.open(settings.run.store)) == 1
    check_goes_on(settings, monkeypatch)


def test_a_refusal_is_noted_where_there_is_room_for_that(settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", raising(os.link, errno.ENOSPC, "run.zarr/"))
        with pytest.raises(StoreFullError):
            run_capture(make_plan(settings))
    (failure,) = store_status(settings.run.store).failures
    assert failure.error.startswith("StoreFullError: no room left to write unit 0")


def raising(really: Callable, code: int, part: str) -> Callable:
    """A system call that fails where its last path has this part."""

    def call(*arguments: object) -> object:
        if part in str(arguments[-1]):
            raise OSError(code, os.strerror(code))
        return really(*arguments)

    return call


def test_what_cannot_be_taken_back_hides_no_error(tmp_path, monkeypatch):
    """The last file is refused a name, then the disk breaks: what is published stays for the next one."""
    store = open_or_create(tmp_path / "run.zarr", 2)
    attempt = write_unit(begin_attempt(store, 1))
    really, calls = os.link, iter(range(100))

    def link(*paths: Path) -> None:
        if next(calls) == 3:
            monkeypatch.setattr(os, "rename", raising(os.rename, errno.EIO, "aside"))
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        really(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(StoreFullError, match="Disk quota exceeded") as refused:
            attempt.commit(RECEIPT)
    monkeypatch.undo()
    assert any("could not be taken back: " in note for note in refused.value.__notes__)
    assert store.done() == [] and len(verify_store(store.path).uncommitted) == 3
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    report = verify_store(store.path)
    assert store.done() == [1] and report.ok and not report.uncommitted


def test_a_store_that_may_not_be_read_is_a_refusal(settings, monkeypatch):
    """Permissions that are taken away while the capture runs."""
    store, really = Path(settings.run.store), os.open

    def closed(path, *arguments, **options):
        if str(path).endswith(".looptap/ledger"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really(path, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(StoreRefusedError, match="Permission denied"):
        run_capture(make_plan(settings), lambda _: patch.setattr(os, "open", closed))
    assert num_attempts(Store.open(store)) == 0
    check_goes_on(settings, monkeypatch)


REAL = """
import os, runpy, subprocess, sys
from pathlib import Path
_, test, mount, ids, how, workers = sys.argv
mount = Path(mount)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=5000", "none", mount], check=True)
from looptap.capture.settings import CaptureSettings
settings = CaptureSettings.of(
    model="random:(0,2x3,0)I,width=32,heads=2", data=Path(ids), store=mount / "run.zarr", unit_tokens=48,
    states=("core[all]@last",), workers=int(workers) or None,
)
runpy.run_path(test)["really"](settings, mount, how)
"""


def really(settings: CaptureSettings, mount: Path, how: str) -> None:
    """Captures on a disk that refuses after three units, and again when it takes more."""
    store_path, is_refusing = Path(settings.run.store), False

    def refuse(event: object) -> None:
        nonlocal is_refusing
        if is_refusing or not isinstance(event, UnitDone) or len(Store.open(store_path).done()) < 3:
            return
        is_refusing = True
        if how == "bytes":
            with pytest.raises(OSError, match="No space left"), open(mount / "filler", "wb", 0) as file:
                while True:
                    file.write(b"x" * 4096)
        elif how == "files":
            (mount / "filler").mkdir()
            with pytest.raises(OSError, match="No space left"):
                for number in range(10_000):
                    (mount / "filler" / str(number)).touch()
        else:  # busy while a file is open for writing
            while subprocess.run(["mount", "-o", "remount,ro", mount], stderr=subprocess.DEVNULL).returncode:
                pass

    with pytest.raises(StoreRefusedError) as refused:
        run_capture(make_plan(settings), refuse)
    print(f"{type(refused.value).__name__}: {refused.value}")
    store, num_workers = Store.open(store_path), settings.run.workers or 1
    assert num_attempts(store) <= len(store.done()) + num_workers, "units were computed for nothing"
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    else:
        subprocess.run(["rm", "-r", mount / "filler"], check=True)
    lease.STALE_S = 0.0  # this process's own lock stayed on the read-only disk
    outcome = run_capture(make_plan(settings))
    report = verify_store(store_path)
    assert outcome.complete and report.ok and not report.uncommitted, report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ("bytes", 0),
        ("bytes", 2),
        ("files", 0),
        pytest.param("files", 2, marks=pytest.mark.full),
        ("read-only", 0),
        pytest.param("read-only", 2, marks=pytest.mark.full),
    ],
)
def test_a_disk_that_really_refuses(tmp_path, how, workers):
    """A small tmpfs in a mount namespace of its own."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        allowed = subprocess.run([*namespace, "true"], check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine does not let users mount a tmpfs")
    (tmp_path / "disk").mkdir()
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 256, (60, 25)))
    command = [sys.executable, "-c", REAL, __file__, str(tmp_path / "disk"), str(tmp_path / "ids.npy")]
    done = subprocess.run(
        [*namespace, *command, how, str(workers)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kind = "StoreRefusedError" if how == "read-only" else "StoreFullError"
    assert done.stdout.startswith(kind) and done.stdout.count("\n") == 1, done.stdout
