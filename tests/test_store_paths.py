"""Where a store may lie, and what looking at it or its lock does there."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import DRIVER_LOCK
from looptap.capture.store.places.lock import driver_lock, lock_holder
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.errors import StoreError, StoreExistsError, StoreLockedError
from looptap.tests.small_stores import RECEIPT, open_or_create, write_unit


def use(path: Path) -> None:
    """Makes a store, fills and checks it, and goes on with it."""
    store = open_or_create(path, 2)
    with driver_lock(path):
        for unit in range(2):
            write_unit(begin_attempt(store, unit)).commit(RECEIPT)
        store.finish()
    assert verify_store(path).ok and open_or_create(path, 2).todo() == []


def test_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "run.zarr").symlink_to(tmp_path / "far")
    use(tmp_path / "run.zarr")
    assert (tmp_path / "run.zarr").is_symlink() and (tmp_path / "far" / "zarr.json").exists()


def test_a_link_to_nothing(tmp_path):
    """Such as to a disk that is not mounted: what it would fill is another."""
    (tmp_path / "run.zarr").symlink_to(tmp_path / "far" / "further")
    with pytest.raises(StoreExistsError, match=r"run\.zarr is a link to .*far/further, which is not there"):
        open_or_create(tmp_path / "run.zarr", 2)
    assert not (tmp_path / "far").exists()


def test_a_folder_that_is_empty_or_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    use(tmp_path / "empty")
    use(tmp_path / "a" / "b" / "c")


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "with space", "a%2Fb", "-x", "line\nbreak"])
def test_odd_names(tmp_path, name):
    use(tmp_path / name)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises((StoreError, OSError), match="too long"):
        open_or_create(tmp_path / ("n" * 256), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True
    ).returncode:
        pytest.skip("may not mount a file system here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_where_a_disk_is_mounted(mounted):
    with pytest.raises(StoreExistsError, match=r"disk is where a disk is mounted.*disk/run\.zarr"):
        open_or_create(mounted, 2)
    assert list(mounted.iterdir()) == []
    use(mounted / "run.zarr")


@pytest.fixture
def path(tmp_path) -> Path:
    open_or_create(tmp_path / "run.zarr", 2)
    return tmp_path / "run.zarr"


def test_status_writes_nothing(path):
    with driver_lock(path):
        before = {entry: entry.stat().st_mtime_ns for entry in (path, *path.rglob("*"))}
        status = store_status(path)
        assert status.driver is not None and status.driver.pid == os.getpid()
        assert {entry: entry.stat().st_mtime_ns for entry in (path, *path.rglob("*"))} == before


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\x00", b'{"host": 1}', b"[" * 99999])
def test_a_lock_that_says_nothing_lapses(path, content):
    (path / DRIVER_LOCK).write_bytes(content)
    assert lock_holder(path) is None and store_status(path).driver is None
    with driver_lock(path) as lock:
        assert lock.held


def test_a_damaged_lock_whose_holder_lives_keeps_others_out(path):
    with driver_lock(path):
        with (path / DRIVER_LOCK).open("r+b") as file:  # the same file, as a disk damages it
            file.truncate(3)
        with pytest.raises(StoreLockedError, match="an unknown host"), driver_lock(path):
            pass
    with driver_lock(path):
        pass


@pytest.mark.parametrize(("ahead_s", "is_live"), [(86400.0, False), (-86400.0, False), (5.0, True)])
def test_a_lock_of_another_clock_lapses(path, ahead_s, is_live):
    mine = {"host": "elsewhere", "pid": 4, "process_start": 5, "machine": "00000000"}
    (path / DRIVER_LOCK).write_text(json.dumps(mine))
    os.utime(path / DRIVER_LOCK, (time.time() + ahead_s,) * 2)
    assert (lock_holder(path) is not None) == is_live
    if is_live:
        with pytest.raises(StoreLockedError, match="process 4 on elsewhere"), driver_lock(path):
            pass
    else:
        with driver_lock(path) as lock:
            assert lock.held


def test_what_was_killed_at_the_lock_is_removed(path):
    for name in ("clock.0123456789abcdef", "driver.lock.0123456789abcdef"):
        (path / ".looptap" / name).write_bytes(b"")
    (path / ".looptap" / "clock.tower").write_bytes(b"mine")
    assert len(verify_store(path).uncommitted) == 2 and verify_store(path).foreign == [".looptap/clock.tower"]
    with driver_lock(path):
        pass
    assert verify_store(path).uncommitted == [] and (path / ".looptap" / "clock.tower").exists()
