"""Events and receipts keep every field on the way through JSON."""

import json

import pytest

from looptap.capture.engines.events import (
    Event,
    FilesRestored,
    Receipt,
    RunBegan,
    SlowUnit,
    UnitDone,
    UnitFailed,
    WorkerJoined,
    WorkerLost,
    WorkerRefused,
)

EVENTS = [
    RunBegan(9, 4),
    FilesRestored(["token_id/c.0"]),
    UnitDone(3, Receipt(num_tokens=100, num_bytes=2**40, num_non_finite=1)),
    UnitFailed(4, "Traceback: no"),
    WorkerJoined(0, "host, process 7", 1),
    WorkerLost(2, "host, process 7", "exit -9", 17, 1),
    WorkerLost(2, "host", "exit -9", None, 0),
    WorkerRefused(0, "no model"),
    SlowUnit(4, "host", 99.6, 3.21),
]


def test_every_kind_is_tried():
    assert {type(event) for event in EVENTS} == set(Event.__subclasses__())


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_pass_through_json(event):
    document = event.to_json()
    assert json.loads(json.dumps(document)) == document
    assert Event.from_json(json.loads(json.dumps(document))) == event


def test_json_says_what_happened():
    assert UnitDone(3, Receipt(5, 6, 7)).to_json() == {
        "kind": "unit_done",
        "unit": 3,
        "receipt": {"num_tokens": 5, "num_bytes": 6, "num_non_finite": 7},
    }


@pytest.mark.parametrize(
    "document",
    [{}, {"kind": "unit_lost"}, {"kind": "unit_failed"}, {"kind": "run_began", "num_units": 1, "more": 2}],
)
def test_what_is_no_event(document):
    with pytest.raises(ValueError, match="is no event of a run"):
        Event.from_json(document)
