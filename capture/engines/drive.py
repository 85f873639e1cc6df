"""Carries the scheduler's decisions out on a pool of workers, and tells whoever watches what happened."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from .events import Died, Done, Event, Give, Kill, NotStarted, Receipt, Report, Start, UnitDone, UnitFailed
from .patience import Limits
from .scheduler import Scheduler

POLL_S = 1.0  # at least so often the run looks at its lock, its members, and whether it is to stop
_LONGEST_STEP_S = 5.0


class Pool(Protocol):
    """Workers somewhere. Leaving it as a context manager ends all that are left."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def num_places(self) -> int:
        """Number of workers that there is room for now, those that run included."""
        ...

    def start(self, worker: int) -> None: ...

    def give(self, worker: int, unit: int) -> None: ...

    def kill(self, worker: int) -> None:
        """Ends a worker, without waiting for long; the pool need not report anything more of it. One that
        does not die keeps its place until it does.
        """
        ...

    def drain(self) -> None:
        """Workers give back what they have not begun."""
        ...

    def poll(self, timeout_s: float) -> Iterable[Report]:
        """Waits for reports and returns them; those of one worker in the order in which they were made."""
        ...


def run_on(
    pool: Pool,
    units: Iterable[int],
    *,
    committed: Callable[[int], Receipt | None],
    goes_on: Callable[[], bool] = lambda: True,
    limits: Limits | None = None,
    wanted: int | None = None,
) -> Iterator[Event]:
    """Works through units until every one is done or failed, or `goes_on` says to stop.

    Args:
        pool: entered already.
        committed: looks into the ledger.
        goes_on: asked about once a second; after False, units under way are finished and none is begun.
            What it raises ends the run.
        wanted: most workers.
    Raises:
        NoWorkersError: no worker is left and none can come.
    """
    scheduler = Scheduler(units, limits, wanted)
    clock, is_draining, looked_s, num_places = _Clock(), False, float("-inf"), 0
    heard: list[Report] = []  # reports that we make ourselves, from the ledger
    while True:
        now_s = clock.now_s()
        if now_s - looked_s >= POLL_S:
            looked_s, num_places = now_s, pool.num_places()
        if not is_draining and not goes_on():
            is_draining = True
            scheduler.drain()
            pool.drain()
        for report in heard:
            scheduler.take(report, now_s)
        heard = []
        for command in scheduler.tick(now_s, num_places):
            match command:
                case Start():
                    pool.start(command.worker)
                case Kill():
                    pool.kill(command.worker)
                    looked_s = float("-inf")
                case Give():
                    receipt = committed(command.unit) if command.again else None
                    if receipt is None:
                        pool.give(command.worker, command.unit)
                    else:
                        heard.append(Done(command.worker, command.unit, receipt))
                case UnitFailed():
                    receipt = committed(command.unit)
                    yield command if receipt is None else UnitDone(command.unit, receipt)
                case _:
                    yield command
        if scheduler.has_ended:
            return
        if not heard:
            for report in pool.poll(POLL_S):
                scheduler.take(report, clock.now_s())
                if isinstance(report, Died | NotStarted):
                    looked_s = float("-inf")


class _Clock:
    """Counts the seconds in which this process runs. If it is stopped, or waits for its disk, so are its
    workers as a rule, and must not all seem slow when it goes on.
    """

    def __init__(self) -> None:
        self._looked_s, self._now_s = time.monotonic(), 0.0

    def now_s(self) -> float:
        looked_s, self._looked_s = self._looked_s, time.monotonic()
        self._now_s += min(self._looked_s - looked_s, _LONGEST_STEP_S)
        return self._now_s
