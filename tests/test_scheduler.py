"""The scheduler's rules, with workers that exist only here and a clock that is moved by hand.

A state machine does to the workers whatever can happen to real ones, in any order: they are slow to come,
refuse to start, finish, raise, die while or after they commit, stop answering and answer again, commit late,
freeze in the middle of a unit and go on, or not.
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
from looptap.capture.engines.patience import MAX_TRIES, Limits
from looptap.capture.engines.scheduler import Scheduler
from looptap.errors import NoWorkersError

LIMITS = Limits(
    reissue_s=3, lost_s=30, retry_s=60, no_worker_s=600, slow_s=20, frozen_s=60, unknown_s=150, grace_s=4
)


@dataclass
class Worker:
    is_placed: bool = False
    is_ready: bool = False
    is_silent: bool = False
    is_frozen: bool = False
    is_slow: bool = False
    began_s: float = 0.0
    units: list[int] = field(default_factory=list)
    """Units that it will run, as it sees it: the scheduler may have taken them away."""
    held: list[int] = field(default_factory=list)
    """Units that nobody else may have, but one other if it is slow."""
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
                others = [w for n, w in self.workers.items() if n != number and unit in w.held]
                assert len(others) <= 1 and all(other.is_slow for other in others), "two at a time at most"
                if not worker.held:
                    worker.began_s, worker.is_slow = self.now_s, False
                if unit not in worker.held:  # or it is asked again
                    assert not worker.is_slow
                    worker.held.append(unit)
                assert len(worker.held) <= LIMITS.depth
                if unit in self.committed:
                    assert again, "only a unit that was given before can be committed"
                    self.release(worker, unit)
                    return [Done(number, unit, Receipt())]
                worker.units.append(unit)
            case SlowUnit(unit=unit, where=where, seconds=seconds):
                worker = self.workers[int(where.removeprefix("host "))]
                assert worker.held[0] == unit and not worker.is_slow and not self.is_draining
                assert seconds == self.now_s - worker.began_s > LIMITS.slow_s
                worker.held, worker.is_slow = [unit], True
            case Kill(worker=number):
                worker = self.workers[number]
                spared = self.is_draining or worker.held[:1] == [] or worker.held[0] in self.ended
                if not worker.is_silent:
                    seconds = self.now_s - worker.began_s
                    assert seconds > (LIMITS.slow_s if spared else LIMITS.frozen_s)
                self.bury(number, counts=worker.is_silent or not spared)
            case WorkerLost(worker=number, unit=unit) if number in self.workers:
                worker = self.workers[number]
                assert worker.is_silent and not worker.is_given_up
                assert unit == (worker.held[0] if worker.held else None)
                worker.held, worker.suspect, worker.is_given_up, worker.is_slow = [], unit, True, False
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

    def bury(self, number, counts=True):
        worker = self.workers.pop(number)
        if worker.is_ready and counts:
            running = worker.held[0] if worker.held else worker.suspect
            if running is not None and running not in self.ended:
                self.deaths[running] += 1

    def pick(self, data, is_fit):
        fit = [number for number, worker in self.workers.items() if is_fit(worker)]
        return data.draw(st.sampled_from(fit)) if fit else None

    def working(self, data):
        return self.pick(data, lambda w: w.is_ready and not w.is_silent and not w.is_frozen and w.units)

    # what can happen

    @rule(data=st.data())
    def place(self, data):
        if (number := self.pick(data, lambda w: not w.is_placed)) is not None:
            self.workers[number].is_placed = True
            self.take(Placed(number, f"host {number}"))

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
                self.release(worker, unit)
                self.take(Returned(number, unit))

    def leave(self, number):
        """A worker is through with what it ran."""
        worker = self.workers[number]
        unit = worker.units.pop(0)
        self.release(worker, unit)
        return unit

    def release(self, worker, unit):
        """It has no more to do with a unit that it may have held."""
        if unit in worker.held:
            if worker.held[0] == unit:
                worker.began_s, worker.is_slow = self.now_s, False
            worker.held.remove(unit)

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
            worker.is_slow, worker.began_s = False, self.now_s
            if worker.units and not still_runs:
                self.committed.add(worker.units[0])
            worker.units = []  # and is asked again for what is still to be done
            others = {unit for other in self.workers.values() if other is not worker for unit in other.held}
            elsewhere = others | self.scheduler._copies | set(self.ended)
            worker.held = [unit for unit in worker.held if unit not in elsewhere and not self.is_draining]
            self.take(Available(number))

    @rule(data=st.data())
    def commit_unheard(self, data):
        if (number := self.pick(data, lambda w: w.is_silent and w.units)) is not None:
            self.committed.add(self.workers[number].units[0])

    @rule(data=st.data(), all_of_them=st.booleans())
    def freeze(self, data, all_of_them):
        for worker in self.workers.values():
            worker.is_frozen |= all_of_them and bool(worker.units)
        if (number := self.working(data)) is not None:
            self.workers[number].is_frozen = True

    @rule(data=st.data())
    def thaw(self, data):
        if (number := self.pick(data, lambda w: w.is_frozen)) is not None:
            self.workers[number].is_frozen = False

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
                assert held is None or held.is_slow == worker.is_slow
            copies = Counter(unit for worker in self.workers.values() for unit in worker.held)
            assert all(count <= 2 for count in copies.values())

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
            if worker.is_silent or worker.is_frozen:
                continue  # for good
            if not worker.is_placed and self.places:
                worker.is_placed = True
                self.take(Placed(number, f"host {number}"))
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


def paced(num_units: int, num_workers: int, **limits) -> Scheduler:
    """Returns a scheduler whose workers have done six units of 2 s each by second 12, and hold the next."""
    scheduler = started(num_units, num_workers, **limits)
    for unit in range(6):
        out = scheduler.tick(2 * unit, num_workers)
        holder = next(n for n, worker in scheduler._workers.items() if unit in worker.units)
        scheduler._workers[holder].began_s = 2 * unit
        scheduler.take(Done(holder, unit, Receipt()), 2 * unit + 2)
        assert not any(isinstance(event, SlowUnit) for event in out)
    scheduler.tick(12, num_workers)
    for worker in scheduler._workers.values():
        worker.began_s = 12
    return scheduler


def running(scheduler: Scheduler) -> dict[int, list[int]]:
    return {number: worker.units for number, worker in scheduler._workers.items()}


def test_a_slow_unit_is_told_once_and_ended_at_the_limit():
    scheduler = paced(30, 1, unit_limit_s=100)
    assert not any(isinstance(event, SlowUnit) for event in scheduler.tick(12 + 19, 1))
    assert SlowUnit(6, "host 0", 21, 2) in scheduler.tick(12 + 21, 1)
    assert scheduler.tick(12 + 99, 1) == []
    out = scheduler.tick(12 + 101, 1)
    assert Kill(0) in out and any(isinstance(e, WorkerLost) and "longer than 100 s" in e.why for e in out)


def test_a_slow_unit_goes_to_the_next_free_worker_and_the_frozen_one_is_killed_for_nothing():
    scheduler = paced(30, 2)
    assert running(scheduler) == {0: [6, 8], 1: [7, 9]}
    for unit in (7, 9):
        scheduler.take(Done(1, unit, Receipt()), 20)
    scheduler.tick(20, 2)
    assert running(scheduler)[1] == [10, 11]
    assert SlowUnit(6, "host 0", 21, 2) in scheduler.tick(33, 2)
    assert running(scheduler) == {0: [6], 1: [10, 11]}, "what waited behind it waits for others"
    for unit in (10, 11):
        scheduler.take(Done(1, unit, Receipt()), 34)
    assert [command for command in scheduler.tick(34, 2) if isinstance(command, Give)] == [
        Give(1, 6, again=True), Give(1, 8, again=True)
    ]  # fmt: skip
    scheduler.take(Done(1, 6, Receipt()), 36)
    assert UnitDone(6, Receipt()) in scheduler.tick(36, 2)
    assert scheduler.tick(40.9, 2) == [], "it may have noticed, and be about to say so"
    kill, lost = scheduler.tick(41, 2)
    assert kill == Kill(0) and isinstance(lost, WorkerLost) and lost.unit == 6
    assert scheduler.tick(41, 2) == [Start(2)]
    assert not scheduler._deaths and not scheduler._errors


def test_a_slow_worker_that_ends_its_unit_first_goes_on():
    scheduler = paced(7, 2)
    assert running(scheduler) == {0: [6], 1: []}
    assert given(scheduler.tick(33, 2)) == [(1, 6)]
    scheduler.take(Done(0, 6, Receipt()), 40)
    assert scheduler.tick(40, 2) == [UnitDone(6, Receipt())] and scheduler.has_ended


def test_two_workers_at_most_have_a_unit():
    """Both are frozen: the first is killed for it after a long time, which counts; then a third gets it."""
    scheduler = paced(7, 3, frozen_s=100)
    assert given(scheduler.tick(33, 3)) == [(1, 6)]
    assert SlowUnit(6, "host 1", 21, 2) in scheduler.tick(33 + 21, 3)
    assert scheduler.tick(200, 3) == []
    kill, lost, give = scheduler.tick(12 + 201, 3)
    assert kill == Kill(0) and isinstance(lost, WorkerLost) and lost.unit == 6
    assert give == Give(2, 6, again=True)
    assert scheduler._deaths == {6: 1}
    scheduler.take(Done(2, 6, Receipt()), 216)
    assert UnitDone(6, Receipt()) in scheduler.tick(216, 3) and scheduler.has_ended


def test_a_lone_frozen_worker_is_replaced_and_each_time_later():
    """A long unit that is honest comes through; one that never ends fails as one that kills does."""
    scheduler, now_s, waits = paced(30, 1), 12.0, []
    for number in range(3):
        assert running(scheduler) == {number: [6, 7]}
        began_s = now_s
        while Kill(number) not in (out := scheduler.tick(now_s, 1)):
            now_s += 1
        waits.append(now_s - began_s)
        assert scheduler.tick(now_s, 1) == [Start(number + 1)]
        ready(scheduler, number + 1, now_s=now_s)
        scheduler.tick(now_s, 1)
    assert waits == [601, 1201, 2401]
    (failed,) = [event for event in out if isinstance(event, UnitFailed)]
    assert failed.unit == 6 and "it took 2401 s" in failed.error
    assert running(scheduler) == {3: [7, 8]}


def test_a_unit_that_others_cannot_run_either_fails_though_one_is_frozen_with_it():
    scheduler = paced(7, 2)
    for number in range(3):
        assert (1, 6) in given(scheduler.tick(33, 2))
        scheduler.take(Raised(1, 6, f"error {number}"), 34)
    assert UnitFailed(6, "error 2") in scheduler.tick(34, 2)


def test_an_error_of_a_slow_worker_does_not_fail_what_another_runs():
    scheduler = paced(7, 2)
    scheduler._errors[6] = 2
    assert given(scheduler.tick(33, 2)) == [(1, 6)]
    scheduler.take(Raised(0, 6, "taken"), 34)
    assert scheduler.tick(34, 2) == []
    scheduler.take(Done(1, 6, Receipt()), 36)
    assert scheduler.tick(36, 2) == [UnitDone(6, Receipt())]


def test_while_too_few_are_done_a_unit_has_long():
    scheduler = started(2, 2)
    scheduler.tick(0, 2)
    scheduler.take(Done(1, 1, Receipt()), 2)
    scheduler.tick(2, 2)
    assert scheduler.tick(599, 2) == []
    assert scheduler.tick(601, 2) == [SlowUnit(0, "host 0", 601, None), Give(1, 0, again=True)]


def test_a_slow_unit_is_not_waited_for_by_a_run_that_is_to_stop():
    scheduler = paced(30, 2)
    scheduler.drain()
    scheduler.take(Returned(0, 8), 13)
    scheduler.take(Returned(1, 9), 13)
    scheduler.take(Done(1, 7, Receipt()), 14)
    assert scheduler.tick(32, 2) == [UnitDone(7, Receipt())] and not scheduler.has_ended
    kill, lost = scheduler.tick(33, 2)
    assert kill == Kill(0) and isinstance(lost, WorkerLost) and "the run is to stop" in lost.why
    assert scheduler.has_ended and 6 in scheduler._open and not scheduler._deaths


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
    assert scheduler.tick(1200, 1) == []


def test_draining_begins_nothing():
    scheduler = started(9, 1)
    scheduler.tick(0, 1)
    scheduler.drain()
    scheduler.take(Returned(0, 1), 1)
    assert scheduler.tick(1, 4) == [] and not scheduler.has_ended
    scheduler.take(Done(0, 0, Receipt()), 2)
    assert scheduler.tick(2, 4) == [UnitDone(0, Receipt())]
    assert scheduler.has_ended and len(scheduler._open) == 8
