"""The scheduler's rules, with workers that exist only here and a clock that is moved by hand.

A state machine does to the workers whatever can happen to real ones, in any order: they are slow to come,
refuse to start, finish, raise, die while or after they commit, stop answering and answer again, commit late.
It keeps its own account of who has what, and holds every command against it.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from looptap.capture.engines.events import (
    Available,
    Died,
    Done,
    Give,
    Kill,
    NotStarted,
    Placed,
    Raised,
    Ready,
    Receipt,
    Returned,
    SlowUnit,
    Start,
    Unavailable,
    UnitDone,
    UnitFailed,
    WorkerJoined,
    WorkerLost,
    WorkerRefused,
)
from looptap.capture.engines.scheduler import MAX_TRIES, Limits, Scheduler
from looptap.errors import NoWorkersError

LIMITS = Limits(reissue_s=3, lost_s=30, retry_s=60, no_worker_s=600)


@dataclass
class Worker:
    is_placed: bool = False
    is_ready: bool = False
    is_silent: bool = False
    units: list[int] = field(default_factory=list)
    """Units that it will run, as it sees it: the scheduler may have taken them away."""
    held: list[int] = field(default_factory=list)
    """Units that nobody else may have."""
    suspect: int | None = None
    is_given_up: bool = False


class Workers(RuleBasedStateMachine):
    """What happens to workers, and what must be true of a scheduler's answers."""

    @initialize(num_units=st.integers(0, 9), wanted=st.none() | st.integers(1, 3), places=st.integers(0, 4))
    def begin(self, num_units, wanted, places):
        self.now_s, self.places, self.wanted = 0.0, places, wanted
        self.scheduler = Scheduler(range(num_units), LIMITS, wanted)
        self.workers: dict[int, Worker] = {}
        self.silent: dict[int, Worker] = {}
        self.committed: set[int] = set()
        self.ended: dict[int, str] = {}
        self.errors, self.deaths = Counter(), Counter()
        self.num_units, self.is_draining, self.gave_up = num_units, False, False
        self.num_started = 0
        self.tick()

    def take(self, report):
        self.scheduler.take(report, self.now_s)

    def tick(self):
        """Carries out what the scheduler wants, as `run_on` does."""
        for _ in range(100):
            heard = []
            try:
                out = self.scheduler.tick(self.now_s, self.places)
            except NoWorkersError:
                assert not any(w.is_placed and not w.is_silent for w in self.workers.values())
                assert len(self.ended) < self.num_units and not self.is_draining
                self.gave_up = True
                return
            for command in out:
                heard += self.carry_out(command)
            for report in heard:
                self.take(report)
            if not heard:
                return
        raise AssertionError("it never comes to rest")

    def carry_out(self, command):
        match command:
            case Start(worker=number):
                assert number == self.num_started and not self.is_draining
                self.num_started += 1
                self.workers[number] = Worker()
                others = [worker for worker in self.workers.values() if not worker.is_given_up]
                assert len(others) <= min(self.places, self.wanted or self.places)
            case Give(worker=number, unit=unit, again=again):
                worker = self.workers[number]
                assert worker.is_ready and not worker.is_silent and not self.is_draining
                assert unit not in self.ended
                assert not any(unit in w.held for n, w in self.workers.items() if n != number)
                if unit not in worker.held:
                    worker.held.append(unit)
                assert len(worker.held) <= LIMITS.depth
                if unit in self.committed:
                    assert again, "only a unit that was given before can be committed"
                    worker.held.remove(unit)
                    return [Done(number, unit, Receipt())]
                worker.units.append(unit)
            case Kill(worker=number):
                assert self.workers[number].is_silent
                self.bury(number)
            case WorkerLost(worker=number, unit=unit) if number in self.workers:
                worker = self.workers[number]
                assert worker.is_silent and not worker.is_given_up
                assert unit == (worker.held[0] if worker.held else None)
                worker.held, worker.suspect, worker.is_given_up = [], unit, True
            case UnitDone(unit=unit):
                assert unit in self.committed
                self.end(unit, "done")
            case UnitFailed(unit=unit):
                assert self.errors[unit] >= MAX_TRIES or self.deaths[unit] >= MAX_TRIES
                self.end(unit, "failed")
        return []

    def end(self, unit, how):
        assert unit not in self.ended, f"unit {unit} is {self.ended[unit]} already"
        self.ended[unit] = how

    def bury(self, number):
        worker = self.workers.pop(number)
        if worker.is_ready:
            running = worker.held[0] if worker.held else worker.suspect
            if running is not None and running not in self.ended:
                self.deaths[running] += 1

    def pick(self, data, is_fit):
        fit = [number for number, worker in self.workers.items() if is_fit(worker)]
        return data.draw(st.sampled_from(fit)) if fit else None

    def working(self, data):
        return self.pick(data, lambda w: w.is_ready and not w.is_silent and w.units)

    # what can happen

    @rule(data=st.data())
    def place(self, data):
        if (number := self.pick(data, lambda w: not w.is_placed)) is not None:
            self.workers[number].is_placed = True
            self.take(Placed(number, "here"))

    @rule(data=st.data())
    def get_ready(self, data):
        if (number := self.pick(data, lambda w: w.is_placed and not w.is_ready)) is not None:
            self.workers[number].is_ready = True
            self.take(Ready(number))

    @rule(data=st.data())
    def refuse(self, data):
        if (number := self.pick(data, lambda w: w.is_placed and not w.is_ready)) is not None:
            del self.workers[number]
            self.take(NotStarted(number, "no model"))

    @rule(data=st.data())
    def finish(self, data):
        if (number := self.working(data)) is not None:
            unit = self.leave(number)
            self.committed.add(unit)
            self.take(Done(number, unit, Receipt()))

    @rule(data=st.data())
    def raise_(self, data):
        if (number := self.working(data)) is not None:
            worker, unit = self.workers[number], self.workers[number].units[0]
            if unit in worker.held and unit not in self.ended:
                self.errors[unit] += 1
            self.take(Raised(number, self.leave(number), "error"))

    @rule(data=st.data())
    def give_back(self, data):
        if self.is_draining and (number := self.working(data)) is not None:
            worker = self.workers[number]
            if len(worker.units) > 1:
                unit = worker.units.pop()
                if unit in worker.held:
                    worker.held.remove(unit)
                self.take(Returned(number, unit))

    def leave(self, number):
        """A worker is through with what it ran."""
        worker = self.workers[number]
        unit = worker.units.pop(0)
        if unit in worker.held:
            worker.held.remove(unit)
        return unit

    @rule(data=st.data(), commits=st.booleans())
    def die(self, data, commits):
        """While it runs a unit, or just after it committed it and before it could say so."""
        if (number := self.pick(data, lambda w: True)) is not None:
            worker = self.workers[number]
            if commits and worker.units:
                self.committed.add(worker.units[0])
            self.bury(number)
            self.take(Died(number, "exit -9"))

    @rule(data=st.data())
    def fall_silent(self, data):
        if (number := self.pick(data, lambda w: w.is_ready and not w.is_silent)) is not None:
            worker = self.workers[number]
            worker.is_silent = True
            for unit in worker.units:
                self.take(Unavailable(number, unit))
            self.take(Unavailable(number, -1))

    @rule(data=st.data(), still_runs=st.booleans())
    def answer(self, data, still_runs):
        """What it ran may have ended unheard, or be lost: it is asked again in either case."""
        if (number := self.pick(data, lambda w: w.is_silent)) is not None:
            worker = self.workers[number]
            worker.is_silent, worker.suspect, worker.is_given_up = False, None, False
            if worker.units and not still_runs:
                self.committed.add(worker.units[0])
            worker.units = []  # and is asked again for what is still to be done
            worker.held = [u for u in worker.held if u not in self.ended and not self.is_draining]
            self.take(Available(number))

    @rule(data=st.data())
    def commit_unheard(self, data):
        if (number := self.pick(data, lambda w: w.is_silent and w.units)) is not None:
            self.committed.add(self.workers[number].units[0])

    @rule(seconds=st.sampled_from([0.5, 2, 5, 31, 61]))
    def wait(self, seconds):
        self.now_s += seconds

    @rule(places=st.integers(0, 4))
    def change_places(self, places):
        self.places = places

    @rule(chance=st.integers(0, 9))
    def drain(self, chance):
        if chance == 0:
            self.is_draining = True
            self.scheduler.drain()

    @rule(number=st.integers(0, 5), unit=st.integers(0, 9))
    def a_word_of_the_dead(self, number, unit):
        """It may come late; only that a unit is committed counts."""
        if number not in self.workers and unit < self.num_units:
            for report in (Raised(number, unit, "late"), Died(number, "late"), Available(number)):
                self.take(report)
            if unit in self.committed:
                self.take(Done(number, unit, Receipt()))

    @invariant()
    def obey(self):
        if hasattr(self, "scheduler") and not self.gave_up:
            self.tick()
            assert len(self.scheduler._open) == self.num_units - len(self.ended)
            for number, worker in self.workers.items():
                held = self.scheduler._workers.get(number)
                assert (held.units if held else []) == worker.held

    def teardown(self):
        """Lets nothing go wrong any more: the run must come to an end, and every unit to its own."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(200):
            self.tick()
            if self.scheduler.has_ended or self.gave_up:
                break
            self.now_s += 20
            self.calm()
        assert self.scheduler.has_ended or self.gave_up, "it waits for nothing"
        if not self.is_draining and not self.gave_up:
            assert set(self.ended) == set(range(self.num_units))
        for unit, how in self.ended.items():
            assert how == "failed" or unit in self.committed

    def calm(self):
        for number, worker in list(self.workers.items()):
            if worker.is_silent:
                continue  # for good
            if not worker.is_placed and self.places:
                worker.is_placed = True
                self.take(Placed(number, "here"))
            elif worker.is_placed and not worker.is_ready:
                worker.is_ready = True
                self.take(Ready(number))
            elif worker.units:
                unit = self.leave(number)
                self.committed.add(unit)
                self.take(Done(number, unit, Receipt()))


Workers.TestCase.settings = settings(
    derandomize=True, max_examples=500, stateful_step_count=50, deadline=None
)
test_every_unit_ends_once_whatever_happens = Workers.TestCase


def ready(scheduler: Scheduler, *workers: int, now_s: float = 0.0) -> None:
    for worker in workers:
        scheduler.take(Placed(worker, f"host {worker}"), now_s)
        scheduler.take(Ready(worker), now_s)


def started(num_units: int, num_workers: int, **limits) -> Scheduler:
    """Returns a scheduler with all its workers ready, and nothing given yet."""
    scheduler = Scheduler(range(num_units), Limits(**limits))
    assert scheduler.tick(0, num_workers) == [Start(worker) for worker in range(num_workers)]
    ready(scheduler, *range(num_workers))
    return scheduler


def given(commands) -> list[tuple[int, int]]:
    return [(command.worker, command.unit) for command in commands if isinstance(command, Give)]


def test_workers_hold_two_units_and_towards_the_end_one():
    scheduler = started(6, 2)
    assert given(scheduler.tick(0, 2)) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    scheduler.take(Done(0, 0, Receipt()), 1)
    assert given(scheduler.tick(1, 2)) == [], "two are left for two workers"
    scheduler.take(Done(0, 2, Receipt()), 2)
    assert given(scheduler.tick(2, 2)) == [(0, 4)]
    scheduler.take(Done(1, 1, Receipt()), 3)
    assert given(scheduler.tick(3, 2)) == []
    scheduler.take(Done(1, 3, Receipt()), 3)
    assert given(scheduler.tick(3, 2)) == [(1, 5)]


def test_a_unit_that_raises_is_tried_three_times_at_once():
    scheduler = started(9, 1)
    scheduler.tick(0, 1)
    for number in range(3):
        scheduler.take(Raised(0, 0, f"error {number}"), number)
        scheduler.take(Done(0, 2 * number + 1, Receipt()), number)
        out = scheduler.tick(number, 1)
        assert ((0, 0) in given(out)) == (number < 2)
    assert UnitFailed(0, "error 2") in out


def test_what_waited_behind_the_unit_that_kills_is_not_to_blame():
    """Unit 0 kills whoever runs it; unit 1 waits behind it each time."""
    scheduler, out = started(9, 1, depth=2), []
    for number in range(3):
        assert given(scheduler.tick(number, 1)) == [(number, 0), (number, 1)]
        scheduler.take(Died(number, "exit -11"), number)
        out = scheduler.tick(number, 1)
        assert WorkerLost(number, f"host {number}", "exit -11", 0, 0) in out
        assert out[-1] == Start(number + 1)
        ready(scheduler, number + 1)
    (failed,) = [event for event in out if isinstance(event, UnitFailed)]
    assert failed.unit == 0 and "died 3 times" in failed.error and "exit -11" in failed.error
    assert given(scheduler.tick(3, 1))[0] == (3, 1)


def test_a_silent_worker_loses_its_units_first_and_its_life_later():
    scheduler = started(9, 2)
    assert given(scheduler.tick(0, 2)) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    scheduler.take(Unavailable(0, 0), 1)
    assert scheduler.tick(1 + 2, 2) == []
    lost, start = scheduler.tick(1 + 2.5, 2)
    assert (
        start == Start(2)
        and isinstance(lost, WorkerLost)
        and (lost.worker, lost.unit, lost.num_workers) == (0, 0, 1)
    )
    scheduler.take(Done(1, 1, Receipt()), 4)
    assert given(scheduler.tick(4, 2)) == [(1, 0)], "what was lost comes first"
    assert not any(isinstance(command, Kill) for command in scheduler.tick(1 + 29, 2))
    out = scheduler.tick(1 + 30, 2)
    assert out == [Kill(0)]


def test_a_silent_worker_that_answers_is_asked_again_for_what_was_not_heard():
    scheduler = started(9, 1)
    scheduler.tick(0, 1)
    scheduler.take(Unavailable(0, 0), 1)
    scheduler.take(Unavailable(0, 1), 1)
    scheduler.take(Available(0), 2)
    assert [c for c in scheduler.tick(2, 1) if isinstance(c, Give)] == [Give(0, 0, True), Give(0, 1, True)]


def test_a_slow_unit_is_told_once_and_ended_at_the_limit():
    scheduler = started(30, 1, unit_limit_s=100)
    for unit in range(6):
        scheduler.tick(2 * unit, 1)
        scheduler.take(Done(0, unit, Receipt()), 2 * unit + 2)
    assert not any(isinstance(event, SlowUnit) for event in scheduler.tick(12 + 19, 1))
    assert SlowUnit(6, "host 0", 21, 2) in scheduler.tick(12 + 21, 1)
    assert scheduler.tick(12 + 99, 1) == []
    out = scheduler.tick(12 + 101, 1)
    assert Kill(0) in out and any(isinstance(e, WorkerLost) and "longer than 100 s" in e.why for e in out)


def test_no_worker_can_be_started():
    scheduler = Scheduler(range(5))
    for number in range(3):
        scheduler.tick(0, 1)
        scheduler.take(Placed(number, "host"), 0)
        scheduler.take(NotStarted(number, "the weights differ"), 0)
    assert scheduler.tick(0, 1) == [WorkerRefused(2, "the weights differ")]
    with pytest.raises(NoWorkersError, match=r"in 3 tries, and 5 units .* the last one: the weights differ"):
        scheduler.tick(1, 1)


def test_a_worker_that_works_outlives_three_that_cannot_start():
    scheduler = started(9, 1)
    scheduler.tick(0, 1)
    for number in range(1, 4):
        assert Start(number) in scheduler.tick(0, 2)
        scheduler.take(NotStarted(number, "no"), 0)
    assert scheduler.tick(59, 2) == [WorkerRefused(3, "no")], "it waits before it tries again"
    assert Start(4) in scheduler.tick(60, 2)


def test_no_worker_comes():
    scheduler = Scheduler(range(5), Limits(no_worker_s=600))
    assert scheduler.tick(0, 0) == scheduler.tick(599, 0) == []
    with pytest.raises(NoWorkersError, match="none came for 600 s; 5 units are not done"):
        scheduler.tick(600, 0)


def test_the_last_worker_leaves_and_another_comes_in_time():
    scheduler = started(5, 1, no_worker_s=600)
    scheduler.tick(0, 1)
    scheduler.take(Died(0, "node died"), 10)
    scheduler.tick(10, 0)
    assert scheduler.tick(600, 0) == []
    assert Start(1) in scheduler.tick(605, 1)
    ready(scheduler, 1, now_s=605)
    assert WorkerJoined(1, "host 1", 1) in scheduler.tick(605, 1)
    assert scheduler.tick(9999, 1) == []


def test_draining_begins_nothing():
    scheduler = started(9, 1)
    scheduler.tick(0, 1)
    scheduler.drain()
    scheduler.take(Returned(0, 1), 1)
    assert scheduler.tick(1, 4) == [] and not scheduler.has_ended
    scheduler.take(Done(0, 0, Receipt()), 2)
    assert scheduler.tick(2, 4) == [UnitDone(0, Receipt())]
    assert scheduler.has_ended and len(scheduler._open) == 8
