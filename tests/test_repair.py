"""`verify --repair`: damaged units are undone, whole, and capturing again gives what it gives in peace."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from looptap.capture.store.care.repair import clean, repair_store
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import COMPLETE, LEDGER, STAGING
from looptap.capture.store.places.directory import LocalPlace
from looptap.capture.store.places.lock import driver_lock
from looptap.capture.store.reading.reader import open_store
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.cli.entry import main
from looptap.cli.tables import print_status
from looptap.errors import StoreError, StoreLockedError
from looptap.tests.small_stores import RECEIPT, Killed, content, open_or_create, unit_values, write_unit

NUM_UNITS = 4


def fill(store: Store) -> None:
    """Fills a store as a capture does: what is to do, then the end."""
    with driver_lock(store.path):
        clean(store)
        for unit in store.todo():
            write_unit(begin_attempt(store, unit)).commit(RECEIPT)
        store.finish()


@pytest.fixture
def store(tmp_path) -> Store:
    store = open_or_create(tmp_path / "run.zarr", NUM_UNITS)
    fill(store)
    return store


def check_calm(store: Store) -> None:
    """Closed, sound, and with the content of a capture that nothing happened to."""
    report = verify_store(store.path)
    assert report.ok and not report.units_missing and not report.uncommitted, report
    assert store_status(store.path).complete
    found = content(store)
    for unit in range(NUM_UNITS):
        for name, values in unit_values(store, unit).items():
            rows = found[name][unit * store.unit_rows(name) :][: store.unit_rows(name)]
            np.testing.assert_array_equal(rows[: len(values)], values, err_msg=name)
            assert np.isnan(rows[len(values) :]).all()


def all_keys(store: Store, unit: int) -> list[str]:
    return [key for name in store.arrays for key in store.shard_keys(name, unit)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(path: Path) -> None:
    """Another unit's file or entry under this name: sound, but not of here."""
    other = path.with_name(path.name.replace("2", "0", 1))
    assert other != path
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [flip, cut, swap, Path.unlink])
@pytest.mark.parametrize("file", ["residual_norm/c.2.0", "state/c.2.0.0", ".looptap/ledger/2.json"])
@pytest.mark.slow
def test_a_damaged_unit_is_done_again(store, file, damage):
    unit = 1 if file.startswith("state") else 2  # two files of states a unit
    damage(store.path / file)
    repair = repair_store(store.path)
    if (
        file.endswith("json") and damage is Path.unlink
    ):  # a unit without an entry is no damage, but unfinished
        assert repair.units_voided == [] and repair.files_removed == 4
    else:
        assert repair.units_voided == [unit]
    assert repair.units_missing == store.todo() == [unit] and repair.irreparable == []
    report = verify_store(store.path)
    assert report.ok and report.uncommitted == []
    assert not store_status(store.path).complete
    assert open_store(store.path)["unit_done"].values.tolist() == [u != unit for u in range(NUM_UNITS)]
    assert not np.asarray(store.group()["unit_done"][...]).any()  # as in any capture that goes on
    fill(store)
    check_calm(store)


def test_the_reason_is_kept(store, capsys):
    flip(store.path / "state/c.2.0.0")
    repair_store(store.path)
    (failure,) = store_status(store.path).failures
    assert (failure.unit, failure.attempt) == (1, 1)
    assert failure.error.startswith("voided by repair: state/c.2.0.0 (unit 1): crc32c")
    assert not failure.done
    print_status(store.path, store_status(store.path))
    assert "failed" in (shown := capsys.readouterr().out) and "mended" not in shown
    fill(store)
    assert store.entry(1)["attempt"] == 2
    print_status(store.path, store_status(store.path))
    assert "failed  unit 1" not in (shown := capsys.readouterr().out) and "1 failed attempts" in shown


def test_a_sound_store_stays_as_it_is(store, files):
    before = files(store.path)
    repair = repair_store(store.path)
    assert repair.problems == [] and repair.units_missing == []
    changed = {name for name, seen in files(store.path).items() if before.get(name) != seen}
    assert {name.rpartition("/")[2] for name in changed} <= {".looptap", "driver.guard"}  # the lock's


def test_what_does_not_belong_is_named_and_stays(store):
    ledger = store.path / LEDGER
    shutil.copy(ledger / "0.json", ledger / "9.json")
    strangers = [ledger / "9.json", ledger / "notes.txt", store.path / "state" / "c.x", store.path / "notes"]
    strangers += [store.path / STAGING / "3.1" / "mine", store.path / "state" / "c.7.0", ledger / "01.json"]
    (store.path / STAGING / "3.1").mkdir()
    for path in strangers[1:]:
        path.write_text("x")
    (store.path / STAGING / "3.1" / "state%2Fc.6.0.0").write_bytes(b"x")  # an attempt's, killed
    repair = repair_store(store.path)
    keys = {str(path.relative_to(store.path)) for path in strangers} - {f"{STAGING}/3.1/mine"}
    assert repair.problems == [] and set(repair.foreign) == keys
    assert all(path.exists() for path in strangers)
    assert [path.name for path in (store.path / STAGING / "3.1").iterdir()] == ["mine"]
    shutil.rmtree(store.path / STAGING / "3.1")
    check_calm(store)


def test_a_unit_of_another_plan_is_done_again(tmp_path):
    """All files and the entry of a unit, sound in themselves, from a store with other settings."""
    store, other = (
        open_or_create(tmp_path / f"{plan}.zarr", NUM_UNITS, recorded_hash=plan) for plan in ("mine", "other")
    )
    fill(store)
    write_unit(begin_attempt(other, 1), salt=1).commit(RECEIPT)
    for key in [*all_keys(store, 1), ".looptap/ledger/1.json"]:
        shutil.copy(other.path / key, store.path / key)
    (problem,) = verify_store(store.path).problems
    assert problem.unit == 1 and "it is of another plan" in problem.what
    assert repair_store(store.path).units_voided == [1]
    fill(store)
    check_calm(store)


def test_leftovers_of_killed_attempts_go(tmp_path):
    store = open_or_create(tmp_path / "run.zarr", 2)
    write_unit(begin_attempt(store, 0)).commit(RECEIPT)
    shutil.copy(store.path / "state/c.0.0.0", store.path / "state/c.2.0.0")
    assert verify_store(store.path).uncommitted == ["state/c.2.0.0"]
    assert repair_store(store.path).files_removed == 0  # no attempt is known that could have left it
    begin_attempt(store, 1)
    repair = repair_store(store.path)
    assert (repair.units_voided, repair.files_removed, repair.units_missing) == ([], 1, [1])
    assert verify_store(store.path).uncommitted == [] and store.done() == [0]


def test_what_passes_and_was_killed_goes_with_the_next_run(store):
    passing = [".looptap/.complete.7.new", "unit_done/.c.0.12.new", f"{LEDGER}/../attempts/.0.1.9.new"]
    passing += ["token_id/.c.0.3.new", ".zarr.json.8.new"]
    strangers = [".looptap/.other.7.new", "state/.c.9.3.new", ".looptap/.complete.x.new"]
    for key in passing + strangers:
        (store.path / key).write_bytes(b"x")
    report = verify_store(store.path)
    assert len(report.uncommitted) == len(passing) and set(report.foreign) == set(strangers)
    clean(store)
    report = verify_store(store.path)
    assert report.ok and report.uncommitted == [] and set(report.foreign) == set(strangers)


@pytest.mark.parametrize("file", ["unit_done/c.0", ".looptap/summary.parquet"])
def test_what_closes_a_store_is_written_again(store, file):
    """No unit is touched for it."""
    (store.path / file).unlink()
    repair = repair_store(store.path)
    assert [problem.file for problem in repair.problems] == [file]
    assert repair.units_voided == [] and repair.units_missing == []
    check_calm(store)


@pytest.mark.parametrize("file", ["state/zarr.json", "unit_done/zarr.json", ".looptap/plan.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_metadata_is_written_again_from_its_copy(store, file, damage):
    damage(store.path / file)
    assert not verify_store(store.path).ok
    repair = repair_store(store.path)
    assert repair.files_restored == [file] and repair.irreparable == []
    check_calm(store)


def test_what_only_the_data_tell_cannot_be_repaired(store, capsys, monkeypatch):
    (store.path / "token_id/c.0").unlink()
    assert run(monkeypatch, "verify", store.path, "--repair") == 1
    said = capsys.readouterr().out
    assert (
        "token_id/c.0" in said
        and "the capture's own command, begun again, writes what only its data tell" in said
    )
    assert store.done() == list(range(NUM_UNITS))


def test_repair_keeps_out_of_a_drivers_way(store):
    flip(store.path / "state/c.2.0.0")
    with driver_lock(store.path), pytest.raises(StoreLockedError, match="is being written by process"):
        repair_store(store.path)
    assert store.done() == list(range(NUM_UNITS))


def test_killed_anywhere_in_a_repair(tmp_path, monkeypatch):
    """A repair is killed before each thing it removes or replaces; another and a capture mend the store."""
    calm = open_or_create(tmp_path / "calm.zarr", NUM_UNITS)
    fill(calm)
    steps = 0
    for stop in range(100):
        path = tmp_path / f"{stop}.zarr"
        shutil.copytree(calm.path, path)
        store = Store.open(path)
        flip(path / "state/c.2.0.0")
        (path / ".looptap/ledger/3.json").write_bytes(b"{")
        with monkeypatch.context() as patch:
            countdown = iter(range(stop))
            for name in ("remove", "replace"):
                patch.setattr(LocalPlace, name, _killed_after(countdown, getattr(LocalPlace, name)))
            try:
                repair_store(path)
                break
            except Killed:
                steps += 1
        report = verify_store(path)
        assert all(problem.unit in (1, 3) or problem.file == COMPLETE for problem in report.problems), report
        # a reader of the ledger sees all sound units, and no unit whose files are gone already
        assert {0, 2} <= set(store.done())
        assert all((path / key).exists() for unit in store.done() for key in all_keys(store, unit))
        assert repair_store(path).units_missing == [1, 3]
        fill(store)
        check_calm(store)
    assert steps >= 6, steps


def _killed_after(countdown, really):
    def step(self, *arguments):
        if arguments != ([],) and next(countdown, None) is None:
            raise Killed
        return really(self, *arguments)

    return step


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command(store, capsys, monkeypatch):
    flip(store.path / "state/c.2.0.0")
    assert run(monkeypatch, "verify", store.path) == 1
    said = capsys.readouterr().out
    assert "looptap verify --repair undoes the units that are damaged" in said
    assert said.endswith("1 problems\n")
    assert run(monkeypatch, "verify", store.path, "--repair") == 1
    said = capsys.readouterr().out
    assert "state/c.2.0.0 (unit 1): crc32c" in said and "1 units are to do again: 1" in said
    assert f"looptap capture MODEL --data FILE --store {store.path} and the settings it had" in said
    fill(store)
    assert run(monkeypatch, "verify", store.path, "--repair") == 0
    assert "every unit is there and as it was written" in capsys.readouterr().out


def test_a_damaged_entry_is_named(store):
    (store.path / LEDGER / "2.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"ledger/2\.json cannot be read .*: run `looptap verify --repair "):
        store_status(store.path)
