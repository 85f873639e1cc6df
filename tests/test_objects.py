"""Stores on a local disk and in an object store pass one contract; then what only an object store can do."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.store.care.repair import repair_store
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.group import store_exists
from looptap.capture.store.keys import MAKING
from looptap.capture.store.layout import create_store
from looptap.capture.store.places import lease, liveness
from looptap.capture.store.places.lock import driver_lock, lock_holder
from looptap.capture.store.places.objects import ObjectPlace
from looptap.capture.store.reading.batches import make_batches
from looptap.capture.store.reading.reader import open_store
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.errors import (
    StoreDamagedError,
    StoreError,
    StoreExistsError,
    StoreLockedError,
    StoreMissingError,
    UnitTakenError,
)
from looptap.tests.s3_server import BUCKET, Door, serve_s3_here
from looptap.tests.small_stores import (
    RECEIPT,
    ROWS,
    Turns,
    content,
    leave_files,
    open_or_create,
    unit_values,
    write_unit,
)
from looptap.tests.state_stores import commit_unit, make_states


@pytest.fixture(scope="module")
def server():
    with serve_s3_here() as door:
        yield door


@pytest.fixture
def door(server) -> Door:
    """The server, with nothing wrong with it."""
    yield server
    server.ignores, server.loses, server.refuses = (), Door.loses, Door.refuses


@pytest.fixture
def url(door, request) -> str:
    return f"s3://{BUCKET}/{request.node.name}/run.zarr"


@pytest.fixture(params=["local", "s3"])
def path(request, tmp_path):
    return tmp_path / "run.zarr" if request.param == "local" else request.getfixturevalue("url")


def expected(store: Store, units: dict[int, int]) -> dict[str, np.ndarray]:
    """Whole arrays by numpy alone, from unit -> salt."""
    whole = {name: np.full(array["shape"], np.nan, np.float32) for name, array in store.arrays.items()}
    for unit, salt in units.items():
        for name, values in unit_values(store, unit, salt).items():
            whole[name][unit * ROWS : unit * ROWS + len(values)] = values
    return whole


def check_content(store: Store, units: dict[int, int]) -> None:
    report = verify_store(str(store))
    assert report.ok and report.uncommitted == [] and report.units_done == sorted(units), report
    for name, values in expected(store, units).items():
        np.testing.assert_array_equal(content(store)[name], values, err_msg=name)


@pytest.mark.slow
def test_written_and_closed(path):
    store = open_or_create(path, 4)
    assert store_exists(path) and store.todo() == [0, 1, 2, 3]
    with pytest.raises(StoreExistsError, match=r"run\.zarr holds a store"):
        create_store(path, plan=bare_plan(4), coordinates={}, arrays={})
    entries = [write_unit(begin_attempt(store, unit)).commit(RECEIPT) for unit in (2, 0)]
    assert store.done() == [0, 2] and list(store.entries()) == entries[::-1]
    check_content(store, {0: 0, 2: 0})
    with pytest.raises(StoreError, match="lacks 2 of 4 units"):
        store.finish()
    with pytest.raises(UnitTakenError, match=r"unit 2 of .* is committed"):
        begin_attempt(store, 2)
    for unit in (1, 3):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    store.finish()
    check_content(store, dict.fromkeys(range(4), 0))
    assert store.group()["unit_done"][...].tolist() == [1, 1, 1, 1]
    status = store_status(path)
    assert status.complete and status.attempts == 4 and status.driver is None
    assert status.num_bytes == sum(sum(store.place.sizes(name).values()) for name in store.arrays) - sum(
        store.place.sizes(name)["zarr.json"] for name in store.arrays
    )


def test_opening_what_is_not_there(path):
    with pytest.raises(StoreMissingError, match=r"run\.zarr does not exist"):
        Store.open(path)
    assert not store_exists(path)


def test_an_attempt_that_is_given_up_leaves_nothing(path):
    store = open_or_create(path, 2)
    with pytest.raises(RuntimeError), begin_attempt(store, 1) as attempt:
        write_unit(attempt)
        raise RuntimeError
    begin_attempt(store, 1).fail("ValueError: out of memory")
    assert store.todo() == [0, 1] and verify_store(path).uncommitted == []
    (failure,) = store_status(path).failures
    assert (failure.unit, failure.attempt, failure.error) == (1, 2, "ValueError: out of memory")


def test_streamed_states(path):
    store = open_or_create(path, 2)
    with begin_attempt(store, 1) as attempt:
        values = unit_values(store, 1)
        writer = attempt.open_writer("state")
        for place, start in enumerate(range(0, len(values["state"]), writer.buffer_rows)):
            for depth in range(writer.num_depths):
                rows = values["state"][start : start + writer.buffer_rows, depth]
                buffer = writer.take()
                buffer.view(np.float32)[: rows.size] = rows.ravel()
                writer.put(place, depth, buffer, len(rows))
        for name in set(values) - {"state"}:
            attempt.write(name, values[name])
        attempt.commit(RECEIPT)
    check_content(store, {1: 0})


def test_a_late_attempt_is_refused(path):
    store = open_or_create(path, 2)
    late, newer = begin_attempt(store, 1), begin_attempt(store, 1)
    assert (late.number, newer.number) == (1, 2)
    write_unit(late, salt=1)
    with pytest.raises(UnitTakenError, match=r"unit 1 of .* has a later attempt: attempt 1 stops"):
        late.commit(RECEIPT)
    write_unit(newer, salt=2).commit(RECEIPT)
    check_content(store, {1: 2})


def test_leftovers_are_replaced(path):
    """What an attempt killed before its ledger entry had put in place."""
    store = open_or_create(path, 2)
    leave_files(store, 1)
    keys = sorted(key for name in store.arrays for key in store.shard_keys(name, 1))
    assert verify_store(path).uncommitted == keys and store.todo() == [0, 1]
    write_unit(begin_attempt(store, 1), salt=2).commit(RECEIPT)
    check_content(store, {1: 2})


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("file", ["residual_norm/c.1.0", "state/c.3.0.0", "token_id/c.0"])
@pytest.mark.slow
def test_verify_finds_damage(path, file, damage):
    store = open_or_create(path, 2)
    for unit in range(2):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    data = bytearray(store.place.read(file))
    data[len(data) // 2] ^= 1
    if damage == "gone":
        store.place.remove([file])
    else:
        store.place.replace(file, bytes(data if damage == "flipped" else data[:-1]))
    (problem,) = verify_store(path).problems
    assert problem.file == file and problem.unit == (None if "token_id" in file else 1)


@pytest.mark.slow
def test_a_repaired_store_is_finished_again(path):
    store = open_or_create(path, 3)
    for unit in range(3):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    store.place.replace("state/c.3.0.0", b"broken")
    repair = repair_store(path)
    assert repair.units_voided == repair.units_missing == [1] and repair.irreparable == []
    assert store.todo() == [1] and not store_status(path).complete
    check_content(store, {0: 0, 2: 0})
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    store.finish()
    check_content(store, {0: 0, 1: 0, 2: 0})


def test_a_driver_keeps_others_out(path):
    open_or_create(path, 2)
    with driver_lock(path) as held:
        assert held.held and lock_holder(path)["pid"] == os.getpid()
        with (
            pytest.raises(StoreLockedError, match=rf"written by process {os.getpid()} on "),
            driver_lock(path),
        ):
            pass
        assert held.held
    assert lock_holder(path) is None
    with driver_lock(path):
        pass


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("num_units", [16, pytest.param(80, marks=pytest.mark.full)])
@pytest.mark.slow
def test_two_attempts_interleaved_in_objects(url, monkeypatch, kill, same, num_units):
    """Units by two attempts of different or the same content that take turns at every request."""
    store = open_or_create(url, num_units)
    monkeypatch.setattr(ObjectPlace, "map", lambda self, function, items: [function(item) for item in items])
    methods = {name: getattr(ObjectPlace, name) for name in ("put", "find", "remove")}

    def attempt() -> None:
        name = threading.current_thread().name
        begun = write_unit(begin_attempt(store, unit), salt=0 if same else ord(name))
        committed.append(begun.commit(RECEIPT))

    outcomes = []
    for unit in range(store.num_units):
        turns, committed = Turns(unit, kill, num_gates=40), []
        if num_before := unit % 2:
            leave_files(store, unit)
        for name, method in methods.items():
            monkeypatch.setattr(ObjectPlace, name, turns.gated(method))
        turns.run(attempt)
        entry = store.entry(unit)
        assert len(committed) <= 1 and (not committed or committed[0] == entry), (unit, committed, entry)
        outcomes.append((len(committed), entry and entry["attempt"] - num_before))
        for name, method in methods.items():
            monkeypatch.setattr(ObjectPlace, name, method)
    report = verify_store(url)
    assert report.ok, report
    wanted = {(1, 2), (0, None)} if kill else {(1, 1), (1, 2)}
    assert wanted <= set(outcomes), Counter(outcomes)
    for unit in store.todo():
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    report = verify_store(url)
    assert report.ok and report.uncommitted == []


def test_one_of_eight_wins(url):
    """The test's server is as strict as the protocol needs, in creating and in replacing."""
    place, tag = ObjectPlace(url), None
    for round_ in range(10):
        winners, together = [], threading.Barrier(8)

        def contend(me: int, over=tag, together=together, winners=winners) -> None:
            together.wait()
            with suppress(FileExistsError):
                # contents that were never there: an ETag tells contents apart, nothing else
                data = os.urandom(8)
                winners.append(place.put("key", data, writer=str(me), over=over))

        threads = [threading.Thread(target=contend, args=[me]) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1, round_
        tag = winners[0]


@pytest.mark.slow
def test_lost_replies(url, door):
    """Every request that writes is carried out and reported as failed, once: tried again, it finds itself."""
    store, seen = open_or_create(url, 3), set()

    def lose_first(method: str, path: str) -> bool:
        lost = method in ("PUT", "POST") and "probe" not in path and (method, path) not in seen
        seen.add((method, path))
        return lost

    door.loses = lose_first
    with driver_lock(url) as held:
        for unit in range(3):
            write_unit(begin_attempt(store, unit)).commit(RECEIPT)
        store.finish()
        assert held.held
    door.loses = Door.loses
    assert len(seen) > 3 * 6 and lock_holder(url) is None
    assert [entry["attempt"] for entry in store.entries()] == [1, 1, 1]
    check_content(store, {0: 0, 1: 0, 2: 0})


@pytest.mark.parametrize("header", ["HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"])
def test_a_server_without_conditions_is_refused(url, door, header):
    door.ignores = (header,)
    name = {"HTTP_IF_NONE_MATCH": "If-None-Match", "HTTP_IF_MATCH": "If-Match"}[header]
    with pytest.raises(StoreError, match=f"ignores {name}: two drivers, or a worker thought dead"):
        open_or_create(url, 2)
    assert not store_exists(url)
    door.ignores = ()
    store = open_or_create(url, 2)
    door.ignores = (header,)
    with pytest.raises(StoreError, match=f"ignores {name}"), driver_lock(url):
        pass
    door.ignores = ()
    assert not [name for name in store.place.names(".looptap") if "probe" in name]


@pytest.mark.slow
def test_what_cannot_be_reached(url, door, monkeypatch):
    """One line each, in bounded time."""
    with pytest.raises(StoreError, match="there is no bucket nowhere: make it, or mend the URL"):
        open_or_create("s3://nowhere/run.zarr", 2)
    door.refuses = lambda method, path: True
    with pytest.raises(
        StoreError, match=r"does not let this account read zarr\.json: check AWS_ACCESS_KEY_ID"
    ):
        Store.open(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    started_s = time.monotonic()
    with pytest.raises(StoreError, match=r"\(http://127\.0\.0\.1:9\): could not .*: check AWS_ENDPOINT_URL"):
        Store.open(url)
    assert time.monotonic() - started_s < 60
    with pytest.raises(StoreError, match="names no bucket"):
        Store.open("s3:///run.zarr")
    with pytest.raises(StoreError, match="cannot hold a store: give a local directory or s3://bucket/prefix"):
        Store.open("gs://bucket/run.zarr")


def test_reading_needs_no_more_than_reading(url, door):
    store = open_or_create(url, 2)
    write_unit(begin_attempt(store, 0)).commit(RECEIPT)
    door.refuses = lambda method, path: method not in ("GET", "HEAD")
    check_content(Store.open(url), {0: 0})
    assert store_status(url).units_done == 1


def test_without_obstore(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"pip install 'looptap\[s3\]'"):
        Store.open("s3://bucket/run.zarr")


def forge_lock(url: str, **changes) -> None:
    mine = {"host": "elsewhere", "pid": 1, "process_start": 1, "machine": "0", "released": False, **changes}
    ObjectPlace(url).replace(".looptap/driver.lock", json.dumps(mine).encode())


@pytest.mark.slow
def test_a_silent_driver_is_succeeded(url, monkeypatch):
    open_or_create(url, 2)
    forge_lock(url)
    with pytest.raises(StoreLockedError, match=r"process 1 on elsewhere \(last sign"), driver_lock(url):
        pass
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    time.sleep(2.1)  # the server counts whole seconds
    with driver_lock(url) as held:
        assert held.held
    monkeypatch.undo()
    forge_lock(url, machine=liveness.machine())  # its number lives here, but is another process by now
    with driver_lock(url):
        pass


def test_heartbeat(url, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    open_or_create(url, 2)
    place = ObjectPlace(url)
    with driver_lock(url) as held:
        beats = {
            json.loads(place.read(".looptap/driver.lock"))["beat"] for _ in range(20) if not time.sleep(0.03)
        }
        assert len(beats) > 3 and held.held
        forge_lock(url)  # as a successor does that thought this one dead
        time.sleep(0.3)
        assert not held.held
    assert json.loads(place.read(".looptap/driver.lock"))["host"] == "elsewhere"  # not ours to change


def test_one_of_many_takes_a_lapsed_lock_over(url, monkeypatch):
    open_or_create(url, 2)
    winners, losers, everyone = [], [], threading.Barrier(6)
    forge_lock(url, machine=liveness.machine())

    def contend() -> None:
        everyone.wait()
        try:
            with driver_lock(url):
                winners.append(1)
                everyone.wait()
        except StoreLockedError:
            losers.append(1)
            everyone.wait()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 5)


def test_a_killed_builder_is_succeeded(url, monkeypatch):
    """Killed before the group's metadata: what is there is no store, and is made anew."""

    class Killed(BaseException):
        pass

    really = ObjectPlace.put

    def put(self: ObjectPlace, key: str, data: bytes, **options) -> str:
        if key == "zarr.json":
            raise Killed
        return really(self, key, data, **options)

    def begin() -> None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ObjectPlace, "put", put)
            open_or_create(url, 2)

    begin()
    assert not store_exists(url) and "token_id" in ObjectPlace(url).names("")
    with pytest.raises(StoreMissingError):
        Store.open(url)
    begin()  # over what the first left
    store = open_or_create(url, 3)
    assert store.num_units == 3 and verify_store(url).ok and verify_store(url).foreign == []
    assert not ObjectPlace(url).exists(MAKING)


@pytest.mark.parametrize("stranger", ["notes.txt", "token_id/c.0", ".looptap/ledger/0.json"])
def test_what_a_killed_builder_did_not_put_keeps_others_out(url, monkeypatch, stranger):
    """Even under a name that a store would have: only objects that the beginning put may go."""

    class Killed(BaseException):
        pass

    really, puts = ObjectPlace.put, []

    def put(self: ObjectPlace, key: str, data: bytes, **options) -> str:
        if key.startswith("token_id") or len(puts) > 3:
            raise Killed
        puts.append(key)
        return really(self, key, data, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ObjectPlace, "put", put)
        open_or_create(url, 2)
    place = ObjectPlace(url)
    obstore.put(place.client, stranger, b"x")
    before = {meta["path"] for meta in obstore.list(place.client).collect()}
    with pytest.raises(StoreExistsError, match="it holds "):
        open_or_create(url, 2)
    assert {meta["path"] for meta in obstore.list(place.client).collect()} == before


def test_a_store_that_lost_its_root_is_no_beginning(url):
    """The same command must not begin anew over it: everything in it would go."""
    store = open_or_create(url, 2)
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    place = ObjectPlace(url)
    with driver_lock(url):
        pass  # leaves the lock's object, as any capture does
    place.remove(["zarr.json"])
    before = {meta["path"]: meta["e_tag"] for meta in obstore.list(place.client).collect()}
    for use in (store_exists, lambda url: open_or_create(url, 2), Store.open):
        with pytest.raises(StoreError, match=r"has lost zarr\.json.*looptap verify --repair"):
            use(url)
    assert {meta["path"]: meta["e_tag"] for meta in obstore.list(place.client).collect()} == before
    assert repair_store(url).files_restored == ["zarr.json"]
    assert verify_store(url).ok and Store.open(url).done() == [1]


def test_other_things_are_left_alone(url, door):
    obstore.put(ObjectPlace(url).client, "notes.txt", b"x")
    with pytest.raises(StoreExistsError, match=r"is not a looptap store, it holds notes\.txt"):
        open_or_create(url, 2)


def test_an_object_that_is_gone_after_its_commit_raises(url):
    """Never a fill value, which would go on into batches and reports."""
    store = make_states(url, 64)
    for unit in range(store.num_units):
        commit_unit(store, unit)
    for key in ("residual_norm/c.1.0", "state/c.2.0.0", "state_all/c.0.0.0", "token_sequence/c.0"):
        ObjectPlace(url).remove([key])
    for missing in ("mask", "raise"):
        dataset = open_store(url, missing=missing)
        for name in ("residual_norm", "state", "state_all", "token_sequence"):
            with pytest.raises(StoreDamagedError, match=rf"{name}.* cannot be read: it is missing"):
                dataset[name].variable.load()
        assert np.isfinite(dataset["lens_token"].variable[:64]).all()  # of a unit that is whole
    with pytest.raises(StoreDamagedError):
        list(make_batches(url))


def test_plain_zarr_reads_it(url, door):
    store = open_or_create(url, 2)
    write_unit(begin_attempt(store, 1)).commit(RECEIPT)
    bare = S3Store(
        BUCKET,
        prefix=url.removeprefix(f"s3://{BUCKET}/"),
        config={"endpoint": door.endpoint},
        client_options={"allow_http": True},
    )
    group = zarr.open_group(zarr.storage.ObjectStore(bare, read_only=True), mode="r")
    for name, values in expected(store, {1: 0}).items():
        np.testing.assert_array_equal(group[name][...], values)


MODEL = "random:(0,2x3,0)I,width=32,heads=2"


@pytest.mark.slow
def test_a_capture_killed_at_random(url, door, tmp_path):
    """The command itself, with SIGKILL, against a capture to disk in peace."""
    ids_path, calm_path = tmp_path / "ids.npy", tmp_path / "calm.zarr"
    np.save(ids_path, np.random.default_rng(0).integers(0, 256, (24, 25)))
    options = ["--data", str(ids_path), "--unit-tokens", "48", "--states", "core[all]@last"]

    def capture(store: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "looptap", "capture", MODEL, *options, "--store", str(store)]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        return subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def committed() -> int:
        return sum("/ledger/" in path and method == "PUT" for method, path in door.requests)

    calm, moments, place = capture(calm_path), random.Random(0), ObjectPlace(url)
    for _ in range(3):
        before, child = committed(), capture(url)
        while committed() < before + moments.randint(2, 5) and child.poll() is None:
            time.sleep(0.005)
        time.sleep(0.03 * moments.random())
        child.send_signal(signal.SIGKILL)
        said, _ = child.communicate()
        assert child.returncode == -signal.SIGKILL, said
    assert 0 < len(place.names(".looptap/ledger")) < 24
    for child in (capture(url), calm):
        said, _ = child.communicate()
        assert child.returncode == 0, said
    store, calm_store = Store.open(url), Store.open(calm_path)
    report = verify_store(url)
    assert report.ok and not report.units_missing and report.uncommitted == [], report
    for name, values in calm_store.group().arrays():
        assert np.asarray(store.group()[name][...]).tobytes() == np.asarray(values[...]).tobytes(), name
    from looptap import open as open_store

    for name, values in open_store(calm_path).variables.items():
        np.testing.assert_array_equal(open_store(url)[name], values, err_msg=str(name))
