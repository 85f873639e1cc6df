"""A capture under attack, in short. The long form is `looptap bench store --kills 100`."""

import pytest

from looptap.benchmarks.chaos import attack

pytestmark = pytest.mark.apart


@pytest.mark.parametrize("num_kills", [8, pytest.param(40, marks=pytest.mark.full)])
def test_a_capture_under_attack_equals_one_left_in_peace(tmp_path, num_kills):
    tally = attack(tmp_path, num_kills)
    assert tally.kills.total() >= num_kills and tally.kills["worker"] and tally.kills["driver"], tally
    assert tally.in_flight >= num_kills / 4, f"the kills hit too little in flight to prove anything: {tally}"
    assert tally.full_disks and tally.pauses and tally.orphan_commits, tally
    assert tally.attempts > tally.num_units, tally
    assert not tally.faults, tally
