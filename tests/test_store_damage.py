"""Damage of every kind: it is named or reading raises, and is repaired as far as the plan goes."""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest

from looptap.capture.engines.events import FilesRestored
from looptap.capture.run import run_capture
from looptap.capture.store.care.planned_files import derived_coordinate
from looptap.capture.store.care.repair import repair_store
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.keys import ATTEMPTS, COMPLETE, FILES, LEDGER, PLAN, STAGING, SUMMARY
from looptap.capture.store.reading.coordinates import Coordinates
from looptap.capture.store.reading.reader import open_store
from looptap.capture.store.writing.commit import Store
from looptap.errors import NoFileError, StoreError
from looptap.tests.store_damage import (
    INTRUDERS,
    Place,
    cut,
    flip,
    lengthen,
    make_calm,
    remove,
    run_case,
    same,
    scramble,
    swap,
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    plan, path = make_calm(tmp_path_factory.mktemp("calm"))
    return plan, path, open_store(path).load()


@pytest.fixture
def copy(calm, tmp_path):
    """A copy of the calm store, and the plan to go on with it."""
    plan, path, _ = calm
    place = Place.copy(path, tmp_path / "outside")
    return place, replace(plan, settings=plan.settings.but(store=place.store))


@pytest.mark.parametrize("number", range(12))
def test_damage_at_random(calm, tmp_path, number):
    plan, path, dataset = calm
    seen = run_case(path, dataset, plan, tmp_path, number)
    assert seen["mended"] or seen["too little is left"]


@pytest.mark.full
def test_damage_at_random_for_long(calm, tmp_path):
    plan, path, dataset = calm
    for number in range(1000, 1100):
        run_case(path, dataset, plan, tmp_path, number)


@pytest.mark.parametrize("how", [flip, cut, lengthen, scramble, remove, swap])
@pytest.mark.parametrize(
    "key", ["zarr.json", PLAN, FILES, "stage/c.0", "gap_norm/zarr.json", COMPLETE, SUMMARY, "unit_done/c.0"]
)
@pytest.mark.slow
def test_one_file_that_the_plan_tells_is_mended_without_the_data(calm, copy, key, how):
    """Every unit stays, and nothing is captured again."""
    place, plan = copy
    before = (place.store / key).read_bytes()
    for seed in range(4):
        how(place.store / key, random.Random(seed))
        if not (place.store / key).exists() or (place.store / key).read_bytes() != before:
            assert key in {problem.file for problem in verify_store(place.store).problems}
        repair = repair_store(place.store)
        assert not repair.units_voided and not repair.units_missing
        if repair.irreparable:  # one bit of the checksum of what only the data tell
            assert (key, how) == (FILES, flip)
            assert run_capture(plan).num_resumed == 6
        assert verify_store(place.store).ok and same(calm[2], open_store(place.store).load())
        assert key in (SUMMARY, COMPLETE) or (place.store / key).read_bytes() == before


@pytest.mark.parametrize("key", [PLAN, "token_id/c.0", f"{LEDGER}/2.json", "state/c.1.0.0"])
@pytest.mark.parametrize("how", INTRUDERS)
def test_what_is_no_file_is_named_and_stays(calm, copy, key, how):
    place, plan = copy
    path = place.store / key
    how(path, random.Random(0))
    mode, outside = path.lstat().st_mode, place.outside()
    found = verify_store(place.store)
    assert key in [problem.file for problem in found.problems] or key in found.foreign
    repair = repair_store(place.store)
    assert key in [problem.file for problem in repair.irreparable] or key in repair.foreign
    with pytest.raises(NoFileError, match="is no file, and a store has one there"):
        run_or_read(plan, place)
    assert path.lstat().st_mode == mode and place.outside() == outside
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    repair_store(place.store)
    assert run_capture(plan).complete and verify_store(place.store).ok
    assert same(calm[2], open_store(place.store).load())


def run_or_read(plan, place) -> None:
    """Raises what the run, a unit of it, or reading what it made fails of."""
    outcome = run_capture(plan)
    for failure in outcome.failures:
        raise NoFileError(failure.error)
    open_store(place.store).load()


@pytest.mark.parametrize("how", INTRUDERS)
def test_a_root_that_is_no_file(calm, copy, how):
    place, plan = copy
    how(place.store / "zarr.json", random.Random(0))
    before = place.outside()
    for use in (Store.open, open_store, verify_store, repair_store, lambda _: run_capture(plan)):
        with pytest.raises(NoFileError, match=r"zarr\.json is no file"):
            use(place.store)
    assert place.outside() == before


@pytest.mark.parametrize("folder", [LEDGER, ATTEMPTS, STAGING, "gap_norm", ".looptap", "token_id"])
def test_a_folder_that_leads_out_is_refused(copy, folder):
    place, plan = copy
    outside = place.root / "elsewhere"
    shutil.move(place.store / folder, outside)
    (place.store / folder).symlink_to(outside)
    before = place.outside()
    for use in (Store.open, open_store, verify_store, repair_store, lambda _: run_capture(plan)):
        with pytest.raises(StoreError, match="is a symbolic link, and a store has none"):
            use(place.store)
    assert place.outside() == before


@pytest.mark.parametrize("key", ["token_id/c.0", "sequence_start/c.0", "sequence_id/c.0", "state_depth/c.0"])
@pytest.mark.parametrize("how", [flip, remove, scramble])
@pytest.mark.slow
def test_coordinates_of_an_unfinished_store_are_restored_before_workers_trust_them(
    calm, copy, tmp_path, key, how
):
    place, plan = copy
    for path in [place.store / COMPLETE, place.store / SUMMARY]:
        path.unlink()
    for unit in (1, 3, 4):
        (place.store / LEDGER / f"{unit}.json").unlink()
    how(place.store / key, random.Random(1))
    with pytest.raises(StoreError, match="the capture's own command"):  # as a worker meets it
        Coordinates(Store.open(place.store)).rows(key.partition("/")[0])
    events = []
    assert run_capture(plan, events.append).complete
    assert FilesRestored([key]) in events
    assert verify_store(place.store).ok and same(calm[2], open_store(place.store).load())


@pytest.mark.parametrize(
    ("one", "other"), [("token_position", "token_sequence"), ("sequence_start", "sequence_id")]
)
def test_coordinates_that_were_exchanged_are_not_taken_for_sound(calm, copy, one, other):
    """Each is whole in itself, of the right shape, and the other's."""
    place, plan = copy
    paths = [place.store / name / "c.0" for name in (one, other)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    keys = [f"{one}/c.0", f"{other}/c.0"]
    assert sorted(problem.file for problem in verify_store(place.store).problems) == sorted(keys)
    repair = repair_store(place.store)
    assert sorted(problem.file for problem in repair.irreparable) == sorted(keys)
    assert repair.files_restored == [] and not verify_store(place.store).ok
    events = []
    assert run_capture(plan, events.append).complete and FilesRestored(sorted(keys)) in events
    assert verify_store(place.store).ok and same(calm[2], open_store(place.store).load())


def test_empty_folders_that_copying_lost_are_made_again(calm, copy):
    place, plan = copy
    for folder in (LEDGER, ATTEMPTS, STAGING):
        shutil.rmtree(place.store / folder)
    assert verify_store(place.store).units_missing == list(range(Store.open(place.store).num_units))
    repair_store(place.store)
    assert run_capture(plan).complete and verify_store(place.store).ok
    assert same(calm[2], open_store(place.store).load())


@pytest.mark.parametrize(
    "lost", [[PLAN, FILES], ["zarr.json", FILES], ["zarr.json", "gap_norm/zarr.json"], ["zarr.json", PLAN]]
)
def test_when_two_copies_are_gone(calm, copy, lost):
    place, _ = copy
    for key in lost:
        (place.store / key).unlink()
    if lost == ["zarr.json", "gap_norm/zarr.json"]:
        with pytest.raises(StoreError, match=r"gap_norm/zarr\.json and its copy in zarr\.json are both"):
            repair_store(place.store)
        return
    if lost == ["zarr.json", PLAN]:
        (place.store / "zarr.json").write_bytes(b"{")
        with pytest.raises(
            StoreError, match=r"plan\.json, which has a copy of the plan, is missing: copy one"
        ):
            repair_store(place.store)
        return
    assert set(repair_store(place.store).files_restored) == set(lost)
    assert verify_store(place.store).ok and same(calm[2], open_store(place.store).load())


@pytest.mark.parametrize(
    ("name", "other", "noted"),
    [("depth", "attention_peak", True), ("token_id", "token_position", True), ("stage", "token_id", False)],
)
@pytest.mark.slow
def test_another_arrays_metadata_are_not_taken_where_both_copies_are_gone(copy, name, other, noted):
    place, _ = copy
    shutil.copy(place.store / other / "zarr.json", place.store / name / "zarr.json")
    (place.store / "zarr.json").unlink()
    if not noted:
        (place.store / FILES).unlink()
    with pytest.raises(StoreError, match=rf"{name}/zarr\.json and its copy in zarr\.json are both"):
        repair_store(place.store)


def test_depths_follow_from_the_plan(calm):
    _, path, dataset = calm
    plan = Store.open(path).plan
    for name in ("depth", "depth_other", "stage", "layer", "recurrence"):
        values = derived_coordinate(plan, name)
        assert values is not None and values.dtype == dataset[name].dtype
        np.testing.assert_array_equal(values, dataset[name])
    assert derived_coordinate(plan, "token_id") is None
