"""The rules of which worker does which unit, and of what happens when one fails; nothing else.

It knows no processes, no Ray, no store, and no clock: reports and the time come in, commands and events come
out in the order in which they are to be carried out. The ledger stays the truth; that a unit was done by a
worker thought lost is found out by whoever carries out `Give` (`drive.py`), and told here as `Done`.

- A unit that raises `MAX_TRIES` times has failed. A worker's death is none of the unit's tries, but one that
  was running on `MAX_TRIES` workers as they died has failed too: it is what kills them.
- A worker holds two units, so that it never waits for the next; towards the end one, so that none of them
  waits behind another while a worker is free.
- A worker that does not answer is set aside: soon its units go to others and another worker is started in its
  place, later it is killed. If it answers in between it gets units again. Its late commits are fenced off by
  the store's attempts.
- A unit that takes many times the median is slow, as if its worker were frozen: what waits behind it goes to
  others, and the next free worker gets a copy of it. Two workers at most have a unit at a time. One that is
  still at a slow unit a little after another committed it is killed, which counts for nothing; one that takes
  the square of that many times is killed for it, alone or not, and that counts as a death.
- While a run drains, a slow unit is not waited for.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .events import (
    Available,
    Command,
    Died,
    Done,
    Event,
    Give,
    Kill,
    NotStarted,
    Placed,
    Raised,
    Ready,
    Report,
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
from .patience import MAX_TRIES, Limits, Pace, Recruits


@dataclass(eq=False)
class _Worker:
    where: str = "not placed"
    is_placed: bool = False
    is_ready: bool = False
    units: list[int] = field(default_factory=list)  # the first is the one it runs
    began_s: float = 0.0
    is_slow: bool = False  # what it runs takes many times the median
    over_since_s: float | None = None  # slow, and another has committed what it runs
    silent_since_s: float | None = None
    unanswered: list[int] = field(default_factory=list)  # nothing will be heard of them
    is_given_up: bool = False  # silent for long enough that its units were taken from it
    suspect: int | None = None  # what it ran then


class Scheduler:
    """Args:
    units: what is to be done, in this order.
    wanted: most workers; None for as many as there is room for.
    """

    def __init__(self, units: Iterable[int], limits: Limits | None = None, wanted: int | None = None):
        self._limits = limits or Limits()
        self._wanted = wanted
        self._todo = deque(units)
        self._open = set(self._todo)
        self._given: set[int] = set()
        self._errors: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()
        self._workers: dict[int, _Worker] = {}
        self._num_numbered = 0
        self._copies: set[int] = set()  # units in line that a slow worker has as well
        self._out: list[Command | Event] = []
        self._pace = Pace(self._limits)
        self._recruits = Recruits(self._limits)
        self._is_draining = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do, or nothing may begin and nothing is running."""
        return not self._open or (self._is_draining and not self.num_in_flight)

    @property
    def num_in_flight(self) -> int:
        return sum(len(worker.units) for worker in self._workers.values())

    def drain(self) -> None:
        """Let no unit and no worker begin any more."""
        self._is_draining = True

    def take(self, report: Report, now_s: float) -> None:
        """Takes in a report of a worker, or of its pool. A report of a worker that is gone changes nothing,
        except that a unit is done.
        """
        if isinstance(report, Done):
            self._done(report, now_s)
        elif (worker := self._workers.get(report.worker)) is not None:
            match report:
                case Placed():
                    worker.is_placed, worker.where = True, report.where
                case Ready():
                    worker.is_ready = True
                    self._recruits.joined()
                    self._out.append(WorkerJoined(report.worker, worker.where, self._num_ready()))
                case NotStarted():
                    self._refused(report.worker, report.why, now_s, died=False)
                case Raised():
                    if self._take_from(worker, report.unit, now_s) and report.unit in self._open:
                        self._count(self._errors, report.unit, report.error)
                case Returned():
                    if self._take_from(worker, report.unit, now_s):
                        self._requeue([report.unit])
                case Unavailable():
                    if worker.silent_since_s is None:
                        worker.silent_since_s = now_s
                    if report.unit in worker.units:
                        worker.unanswered.append(report.unit)
                case Available():
                    self._answers(report.worker, worker, now_s)
                case Died():
                    if worker.is_ready:
                        self._lose(report.worker, report.why)
                    else:
                        self._refused(report.worker, report.why, now_s, died=True)

    def tick(self, now_s: float, num_places: int) -> list[Command | Event]:
        """Returns the commands to carry out now, in order.

        Args:
            num_places: workers that there is room for at the moment, those that run included.
        Raises:
            NoWorkersError: no worker is left and none can come.
        """
        for number, worker in list(self._workers.items()):
            if worker.silent_since_s is not None:
                self._silent(number, worker, now_s - worker.silent_since_s)
            elif worker.units:
                self._judge(number, worker, now_s)
        if not self.has_ended and not self._is_draining:
            if not any(isinstance(command, Kill) for command in self._out):
                self._start(now_s, num_places)  # or its place may not be free yet
            self._give(now_s)
            if not self._out:
                has_worker = any(w.is_placed and w.silent_since_s is None for w in self._workers.values())
                self._recruits.check(has_worker, len(self._open), now_s)
        out, self._out = self._out, []
        return out

    def _done(self, report: Done, now_s: float) -> None:
        if (worker := self._workers.get(report.worker)) is not None:
            began_s = worker.began_s
            if worker.units[:1] == [report.unit]:
                self._pace.add(now_s - began_s)
            self._take_from(worker, report.unit, now_s)
        if report.unit in self._open:
            self._open.discard(report.unit)  # where it lies in todo it is skipped
            self._out.append(UnitDone(report.unit, report.receipt))

    def _take_from(self, worker: _Worker, unit: int, now_s: float) -> bool:
        """Takes a unit from a worker; returns whether the worker had it."""
        if unit not in worker.units:
            return False
        if worker.units[0] == unit:
            worker.began_s, worker.is_slow, worker.over_since_s = now_s, False, None
        worker.units.remove(unit)
        return True

    def _requeue(self, units: list[int]) -> None:
        """Puts units first in line: lost ones run next, and a unit that always fails is soon known to. One
        that is in line already, or that another worker has, is left there.
        """
        for unit in reversed(units):
            if unit in self._open and unit not in self._copies and not self._holders(unit):
                self._todo.appendleft(unit)

    def _holders(self, unit: int) -> list[_Worker]:
        return [worker for worker in self._workers.values() if unit in worker.units]

    def _count(self, counter: Counter[int], unit: int, why: str) -> None:
        """Counts one more try, or death, of an open unit that was taken from its worker."""
        counter[unit] += 1
        if counter[unit] < MAX_TRIES or not all(worker.is_slow for worker in self._holders(unit)):
            self._requeue([unit])
        else:
            self._open.discard(unit)
            self._out.append(UnitFailed(unit, why))

    def _lose(self, number: int, why: str, *, counts: bool = True) -> None:
        """Removes a lost worker: its units go to others, and the one that it ran is suspected, if that
        counts.
        """
        worker = self._workers.pop(number)
        units, running = worker.units, worker.units[0] if worker.units else worker.suspect
        event = WorkerLost(number, worker.where, why, running, self._num_ready())
        if not worker.is_given_up:
            self._out.append(event)  # or it was said when its units were taken from it
        self._requeue(units[1:])
        if not counts:
            self._requeue(units[:1])
        elif running is not None and running in self._open:
            died = f"the worker that ran it died {MAX_TRIES} times, last {worker.where}: {why}"
            if units:
                self._count(self._deaths, running, died)
            else:  # it is with another worker already, or waits for one
                self._deaths[running] += 1

    def _kill(self, number: int, why: str, *, counts: bool = True) -> None:
        self._out.append(Kill(number))
        self._lose(number, why, counts=counts)

    def _refused(self, number: int, why: str, now_s: float, *, died: bool) -> None:
        del self._workers[number]
        self._recruits.refused(why, now_s, died=died)
        self._out.append(WorkerRefused(number, why))

    def _answers(self, number: int, worker: _Worker, now_s: float) -> None:
        worker.silent_since_s, worker.suspect, worker.is_given_up = None, None, False
        for unit in worker.unanswered:
            is_elsewhere = unit in self._copies or self._holders(unit) != [worker]
            if unit in self._open and not self._is_draining and not is_elsewhere:
                self._out.append(Give(number, unit, again=True))
            elif self._take_from(worker, unit, now_s):
                self._requeue([unit])
        worker.unanswered, worker.began_s, worker.is_slow = [], now_s, False

    def _silent(self, number: int, worker: _Worker, silent_s: float) -> None:
        why = f"does not answer for {silent_s:.0f} s"
        if silent_s >= self._limits.lost_s:
            self._kill(number, why)
        elif silent_s >= self._limits.reissue_s and not worker.is_given_up:
            worker.is_given_up, worker.suspect = True, worker.units[0] if worker.units else None
            self._out.append(WorkerLost(number, worker.where, why, worker.suspect, self._num_ready()))
            units, worker.units, worker.unanswered, worker.is_slow = worker.units, [], [], False
            self._requeue(units)

    def _judge(self, number: int, worker: _Worker, now_s: float) -> None:
        """Judges a worker by the time that it takes for what it runs."""
        unit, seconds, limit_s = worker.units[0], now_s - worker.began_s, self._limits.unit_limit_s
        if limit_s is not None and seconds > limit_s:
            self._kill(number, f"unit {unit} took longer than {limit_s:g} s")
        elif worker.is_slow or seconds > self._pace.slow_s():
            self._slow(number, worker, seconds, now_s)

    def _slow(self, number: int, worker: _Worker, seconds: float, now_s: float) -> None:
        unit, *waiting = worker.units
        if self._is_draining:
            self._kill(number, f"it takes {seconds:.0f} s, and the run is to stop", counts=False)
        elif not worker.is_slow:
            worker.is_slow, worker.units = True, [unit]
            self._out.append(SlowUnit(unit, worker.where, seconds, self._pace.median_s))
            self._requeue(waiting)
            self._copy(unit)
        elif unit not in self._open:
            if worker.over_since_s is None:
                worker.over_since_s = now_s
            elif now_s - worker.over_since_s >= self._limits.grace_s:
                self._kill(number, "another worker committed it, and this one goes on", counts=False)
        elif seconds > self._pace.frozen_s(self._deaths[unit]):
            self._kill(number, f"it took {seconds:.0f} s")
        else:
            self._copy(unit)

    def _copy(self, unit: int) -> None:
        """Puts a slow unit first in line, unless a second worker has it or will."""
        if unit in self._open and unit not in self._copies and len(self._holders(unit)) == 1:
            self._copies.add(unit)
            self._todo.appendleft(unit)

    def _start(self, now_s: float, num_places: int) -> None:
        if not self._recruits.may_start(now_s):
            return
        num_slow = sum(worker.is_slow for worker in self._workers.values())
        most = min(num_places, len(self._open) + num_slow, self._wanted or num_places)
        for _ in range(most - sum(not worker.is_given_up for worker in self._workers.values())):
            self._workers[self._num_numbered] = _Worker()
            self._out.append(Start(self._num_numbered))
            self._num_numbered += 1

    def _give(self, now_s: float) -> None:
        free = [
            (number, worker)
            for number, worker in self._workers.items()
            if worker.is_ready and worker.silent_since_s is None and not worker.is_slow
        ]
        for depth in range(self._limits.depth):  # first one for everybody
            for number, worker in free:
                if len(worker.units) > depth or (depth and len(self._todo) <= len(free)):
                    continue
                while self._todo and self._todo[0] not in self._open:
                    self._todo.popleft()
                if not self._todo:
                    return
                unit = self._todo.popleft()
                self._copies.discard(unit)
                if not worker.units:
                    worker.began_s = now_s
                worker.units.append(unit)
                self._out.append(Give(number, unit, again=unit in self._given))
                self._given.add(unit)

    def _num_ready(self) -> int:
        return sum(w.is_ready and w.silent_since_s is None for w in self._workers.values())
