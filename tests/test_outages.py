"""Object stores that are away for a while: whatever asks them waits, says so, and loses nothing by it.

Patience is cut to seconds by the constants that hold it; a request that nobody answers times out after one.
"""

import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import looptap
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.places import bucket, lease, object_lock, server
from looptap.capture.store.places.lock import driver_lock, lock_holder
from looptap.capture.store.places.objects import ObjectPlace
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.errors import BucketMissingError, StoreError, StoreLockedError, StoreUnreachableError
from looptap.tests.s3_server import BUCKET, OUTAGES, Door, serve_s3, serve_s3_here
from looptap.tests.small_stores import RECEIPT, open_or_create, write_unit

TINY = "random:(0,2x3,0)I,width=32,heads=2"
LOCK = ".looptap/driver.lock"
KINDS = [each if each == "stopped" else pytest.param(each, marks=pytest.mark.full) for each in OUTAGES]


@pytest.fixture(scope="module")
def served():
    with serve_s3_here() as door:
        yield door


@pytest.fixture
def door(served, monkeypatch) -> Iterator[Door]:
    """The server, there, and known to nobody."""
    monkeypatch.setattr(bucket, "_REQUEST_S", 1)
    server.server_at.cache_clear()
    yield served
    served.refuses = served.loses = Door.loses


@pytest.fixture
def url(door, request) -> str:
    return f"s3://{BUCKET}/{request.node.name}/run.zarr"


@contextmanager
def flickering(door: Door, outage: str, seed: int = 0) -> Iterator[None]:
    """Is away for moments at random, about half of the time."""
    moments, stop = random.Random(seed), threading.Event()

    def flicker() -> None:
        while not stop.wait(0.2 * moments.random()):
            with door.away(outage):
                stop.wait(0.2 * moments.random())

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def leave_after(door: Door, num_requests: int, outage: str, seconds: float) -> threading.Thread:
    """Is away once, from a number of requests on."""
    wanted = len(door.requests) + num_requests

    def wait() -> None:
        while len(door.requests) < wanted:
            time.sleep(0.001)
        with door.away(outage):
            time.sleep(seconds)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def attempts(url: str) -> dict[int, int]:
    return {entry["unit"]: entry["attempt"] for entry in Store.open(url).entries()}


@pytest.mark.slow
@pytest.mark.parametrize("outage", KINDS)
def test_every_request_is_tried_again(url, door, outage):
    """Reads and writes, conditional ones too: what was carried out though its answer was lost counts once."""
    with flickering(door, outage):
        store = open_or_create(url, 3)
        with driver_lock(url) as held:
            for unit in range(3):
                write_unit(begin_attempt(store, unit)).commit(RECEIPT)
            store.finish()
            assert held.held
        status, report = store_status(url), verify_store(url)
        values = looptap.open(url)["residual_norm"].values
    assert status.complete and status.attempts == 3 and status.driver is None
    assert report.ok and report.uncommitted == [] and report.units_done == [0, 1, 2]
    assert attempts(url) == {0: 1, 1: 1, 2: 1}
    np.testing.assert_array_equal(values, looptap.open(url)["residual_norm"].values)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 256, (8, 25)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("outage", KINDS)
def test_a_capture_waits_and_says_so(url, door, rows, outage, caplog):
    """One outage at a random moment: one line when it begins and one when it is over, and no unit twice."""
    settings = {"states": ("core[all]@last",), "unit_tokens": 50, "device": "cpu"}
    calm = looptap.capture(TINY, rows, **settings)
    thread = leave_after(door, random.Random(outage).randint(40, 120), outage, 1.8)
    with caplog.at_level(logging.WARNING, "looptap.store"):
        captured = looptap.capture(TINY, rows, url, **settings)
    thread.join(5)
    assert not thread.is_alive(), "the capture was done before it began"
    away, back = (record.getMessage() for record in caplog.records)
    assert away.startswith(f"s3://{BUCKET} ({door.endpoint}) does not answer (")
    assert away.endswith("; trying again for 5 min") and "answers again, after " in back
    report = verify_store(url)
    assert report.ok and report.uncommitted == [] and set(attempts(url).values()) == {1}
    for name, values in calm.variables.items():
        np.testing.assert_array_equal(captured[name], values, err_msg=str(name))


def command(*arguments: str, before: str = "") -> subprocess.Popen:
    """The command in a process of its own, after a line of Python."""
    code = f"{before}\nimport sys\nfrom looptap.cli.entry import main\nsys.argv[0] = 'looptap'\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture
def options(tmp_path, url) -> list[str]:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 256, (40, 25)))
    options = ["capture", TINY, "--data", str(tmp_path / "ids.npy"), "--unit-tokens", "50", "--store", url]
    return [*options, "--states", "core[all]@last"]


def wait_for_units(door: Door, capture: subprocess.Popen, num_units: int) -> None:
    def committed() -> int:
        return sum("/ledger/" in path and method == "PUT" for method, path in door.requests)

    wanted = committed() + num_units
    while committed() < wanted and capture.poll() is None:
        time.sleep(0.005)


@pytest.mark.full
@pytest.mark.parametrize(("workers", "outage"), [(1, "stopped"), (2, "reset"), (2, "503")])
def test_workers_wait_too(url, door, options, workers, outage):
    """The driver says it for all of them."""
    capture = command(*options, "--workers", str(workers), before=BEATS)
    wait_for_units(door, capture, 3)
    with door.away(outage):
        time.sleep(2.5)
    said, _ = capture.communicate()
    assert capture.returncode == 0, said
    assert said.count("does not answer") == said.count("answers again") == 1 and "Traceback" not in said
    assert set(attempts(url).values()) == {1} and verify_store(url).ok


BEATS = "from looptap.capture.store.places import lease, server; lease.HEARTBEAT_S = 0.2"


@pytest.mark.full
@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["here", "workers"])
def test_patience_ends(url, door, options, workers):
    """One message and exit code 2, and the same command goes on."""
    capture = command(*options, *workers, before=f"{BEATS}; server.PATIENCE_S = 2.0")
    wait_for_units(door, capture, 3)
    with door.away("stopped"):
        said, _ = capture.communicate(timeout=60)
    assert capture.returncode == 2 and "Traceback" not in said, said
    assert said.count("trying again for 2 s") == 1
    (message,) = [line for line in said.splitlines() if line.startswith("looptap: ")]
    assert message.startswith(f"looptap: {url} ({door.endpoint}): could not ")
    assert "Connection refused; it was tried for " in message
    done = len(Store.open(url).done())
    assert 3 <= done < 20 and lock_holder(url) is None
    again = command(*options, *workers)
    said, _ = again.communicate()
    assert again.returncode == 0 and f"{done} of them before" in said, said
    assert sum(attempt > 1 for attempt in attempts(url).values()) <= 4  # those that were under way
    assert verify_store(url).ok


@pytest.mark.parametrize("outage", ["stopped", "paused", "reset"])
@pytest.mark.slow
def test_patience_is_of_the_server(door, outage, monkeypatch):
    """What is asked once it is over fails at once, or Ctrl-C would be followed by minutes of clearing up."""
    place = ObjectPlace(f"s3://{BUCKET}/x")
    assert place.names("nothing") == []
    monkeypatch.setattr(server, "PATIENCE_S", 1.0)
    with door.away(outage):
        for least_s, most_s in ((1.0, 4.0), (0.0, 1.5), (0.0, 1.5)):
            started_s = time.monotonic()
            with pytest.raises(StoreUnreachableError, match=r"could not read key: .*; it was tried for \d"):
                place.read("key")
            assert least_s <= time.monotonic() - started_s < most_s
    with pytest.raises(FileNotFoundError):
        place.read("key")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nosuch.invalid"])
def test_a_server_that_never_answered(door, monkeypatch, endpoint):
    """Its address may be wrong: seconds, not minutes, unless another process knows better."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(server, "FIRST_S", 0.5)
    place, started_s = ObjectPlace(f"s3://{BUCKET}/x"), time.monotonic()
    with pytest.raises(StoreUnreachableError, match="check AWS_ENDPOINT_URL and AWS_REGION"):
        place.read("key")
    assert time.monotonic() - started_s < 3


@pytest.mark.slow
def test_a_worker_that_starts_in_an_outage(url, door, monkeypatch):
    """It never heard of the server; its driver did."""
    store = open_or_create(url, 2)
    sent = pickle.dumps(store.place)
    monkeypatch.setattr(server, "FIRST_S", 0.2)
    for opened in (lambda: pickle.loads(sent).read("zarr.json"), lambda: Store.open(url, is_known=True)):
        server.server_at.cache_clear()
        with away_for(door, 1.5):
            assert opened()


@contextmanager
def away_for(door: Door, seconds: float) -> Iterator[None]:
    """Is away from now on, and back after a while."""
    door.leave("stopped")
    timer = threading.Timer(seconds, door.come_back)
    timer.start()
    yield
    timer.join()


def test_what_will_not_pass_is_said_at_once(url, door):
    store, started_s = open_or_create(url, 2), time.monotonic()
    with pytest.raises(BucketMissingError):
        ObjectPlace("s3://nowhere/x").names("")
    door.refuses = lambda method, path: True
    for forbidden in (lambda: store.place.read("zarr.json"), lambda: store.place.create("x", b"")):
        with pytest.raises(StoreError, match="does not let this account"):
            forbidden()
    assert time.monotonic() - started_s < 5


@pytest.mark.slow
def test_what_cannot_be_read_now_is_no_damage(url, door, monkeypatch):
    store = open_or_create(url, 2)
    write_unit(begin_attempt(store, 0)).commit(RECEIPT)
    monkeypatch.setattr(server, "PATIENCE_S", 0.3)
    for key in (".looptap/files.json", "/ledger/", "residual_norm/c.0"):
        door.loses = lambda method, path, key=key: method == "GET" and key in path
        with pytest.raises(StoreUnreachableError, match="could not read"):
            verify_store(url)
    door.loses = Door.loses
    assert verify_store(url).ok


@pytest.mark.full
@pytest.mark.parametrize("outage", ["stopped", "paused"])
@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["here", "worker"])
def test_ctrl_c_while_it_waits(url, door, options, outage, workers):
    """The first lets units in flight finish, which may be long; the second is obeyed."""
    capture = command(*options, *workers)
    wait_for_units(door, capture, 3)
    with door.away(outage):
        time.sleep(1.0)
        for _ in range(2):
            capture.send_signal(signal.SIGINT)
            time.sleep(0.5)
        said, _ = capture.communicate(timeout=60)  # and not the five minutes of patience
    assert capture.returncode == 130 and "Traceback" not in said, said
    assert "finishing the units in flight" in said
    again = command(*options, *workers)
    assert again.wait() == 0 and verify_store(url).ok


@pytest.mark.full
def test_ctrl_c_while_a_command_reads(url, door):
    store = open_or_create(url, 2)
    for arguments in (("status", url), ("verify", url), ("info", url)):
        with door.away("paused"):
            reading, num_requests = command(*arguments), len(door.requests)
            time.sleep(4)
            reading.send_signal(signal.SIGINT)
            said, _ = reading.communicate(timeout=60)  # and not the five minutes of patience
            assert len(door.requests) == num_requests
        assert reading.returncode == 130 and "Traceback" not in said, said
    assert store.todo() == [0, 1]


@pytest.fixture
def quick_lock(monkeypatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 1.0)


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.mark.parametrize("outage", ["stopped", "paused", "503"])
@pytest.mark.slow
def test_an_outage_takes_no_lock_away(url, door, quick_lock, outage):
    """It lasts longer than a lock does without a sign of life, but nobody can have taken it meanwhile."""
    open_or_create(url, 2)
    with driver_lock(url) as held:
        with door.away(outage):
            until_s = time.monotonic() + 2.2
            while time.monotonic() < until_s:
                assert held.held
                time.sleep(0.05)
        held.check()
        beat = ObjectPlace(url).read(LOCK)
        wait_until(lambda: ObjectPlace(url).read(LOCK) != beat, 8)
        assert held.held
    assert lock_holder(url) is None


@pytest.mark.slow
def test_a_lock_that_was_taken_over_in_an_outage(url, door, quick_lock, monkeypatch):
    """The server was away for its holder alone, who hears of it as soon as it is back."""
    open_or_create(url, 2)
    with serve_s3() as other_way:
        with driver_lock(url) as first:
            with door.away("stopped"):
                time.sleep(2.1)  # the server counts whole seconds
                assert first.held
                monkeypatch.setenv("AWS_ENDPOINT_URL", other_way.endpoint)
                with monkeypatch.context() as patch:  # on another machine
                    patch.setattr(object_lock, "machine", lambda: "another")
                    second = driver_lock(url)
                    held = second.__enter__()
            monkeypatch.setenv("AWS_ENDPOINT_URL", door.endpoint)
            with pytest.raises(StoreLockedError, match="another run has taken"):
                first.check()
            wait_until(lambda: not first.held, 8)
        held.check()
        assert held.held, "the first one's release was of its own lock alone"
        second.__exit__(None, None, None)


def test_a_lock_that_cannot_be_kept(url, door, quick_lock, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE_S", 0.5)
    open_or_create(url, 2)
    message = r"could not write \.looptap/driver\.lock"
    with pytest.raises(StoreUnreachableError, match=message), driver_lock(url) as held, door.away("stopped"):
        wait_until(lambda: not held.held, 5)
    with driver_lock(url) as held:  # what could not be released is of this process, which has it no more
        assert held.held


def test_a_beat_under_way_at_the_release(url, door, monkeypatch):
    """It was carried out and nobody heard: the lock is released for all that."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    open_or_create(url, 2)
    with driver_lock(url):
        wait_until(lambda: door.requests[-1] == ("PUT", door.requests[-1][1]), 5)
        door.loses = lambda method, path: method == "PUT" and path.endswith("driver.lock")
        time.sleep(0.5)
        door.loses = Door.loses
    assert lock_holder(url) is None


@pytest.mark.slow
def test_readers_wait(url, door, monkeypatch):
    """zarr-python's requests, of a Dataset that was sent to another process as well."""
    store = open_or_create(url, 2)
    for unit in range(2):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    calm = looptap.open(url).load()
    dataset = looptap.open(url)
    for each in (dataset, pickle.loads(pickle.dumps(dataset))):
        with flickering(door, "reset", 1):
            for name, values in calm.variables.items():
                np.testing.assert_array_equal(each[name].values, values, err_msg=str(name))
    zarr_store = store.zarr_store()
    assert pickle.loads(pickle.dumps(zarr_store)) == zarr_store
    monkeypatch.setattr(server, "PATIENCE_S", 0.5)
    dataset = looptap.open(url)
    with door.away("stopped"), pytest.raises(StoreUnreachableError, match="could not read residual_norm"):
        _ = dataset["residual_norm"].values


@pytest.mark.full
def test_the_process_ends_well(url, door):
    """A thread of obstore's that needed Python while it exits aborted one process in fifteen."""
    code = """
import sys, time
from looptap.capture.store.places import lease
from looptap.capture.store.places.lock import driver_lock
from looptap.capture.store.places.open import open_place
lease.HEARTBEAT_S = 0.01
with driver_lock(sys.argv[1]):
    place = open_place(sys.argv[1])
    place.map(place.find, ["a"] * 8)
"""
    codes = [subprocess.run([sys.executable, "-c", code, url]).returncode for _ in range(40)]
    assert codes == [0] * 40
