"""A capture under attack, in short: 20 kills. The long form is `looptap bench store --kills 100`."""

from looptap.benchmarks.chaos import attack


def test_a_capture_under_attack_equals_one_left_in_peace(tmp_path):
    tally = attack(tmp_path, num_kills=20)
    assert tally.kills.total() >= 20 and tally.kills["worker"] and tally.kills["driver"], tally
    assert tally.in_flight >= 5, f"the kills hit too little in flight to prove anything: {tally}"
    assert tally.full_disks and tally.pauses and tally.orphan_commits, tally
    assert tally.attempts > tally.num_units, tally
    assert not tally.faults, tally
