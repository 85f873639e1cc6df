"""The engine of this process: one worker, which runs a unit inside `poll`."""

import os
import platform
import traceback
from collections import deque
from collections.abc import Iterable

from .events import Done, Placed, Raised, Ready, Report
from .work import ENDS_RUN, Recipe, RunUnit


class ThisProcess:
    """A pool of one worker, which cannot be killed; an error while it is built is raised unchanged."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._run: RunUnit | None = None
        self._reports: list[Report] = []
        self._units: deque[int] = deque()

    def __enter__(self) -> "ThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._run = None

    def num_places(self) -> int:
        return 1

    def start(self, worker: int) -> None:
        self._run = self._recipe()
        self._reports += [Placed(worker, f"{platform.node()}, process {os.getpid()}"), Ready(worker)]

    def give(self, worker: int, unit: int) -> None:
        self._units.append(unit)

    def kill(self, worker: int) -> None:
        raise AssertionError("the worker of this process answers whenever it is asked")

    def drain(self) -> None:
        """Does nothing: one unit is held at a time, so none waits."""

    def poll(self, timeout_s: float) -> Iterable[Report]:
        """Raises StoreRefusedError, StoreUnreachableError: no unit can be committed any more."""
        if self._reports:
            reports, self._reports = self._reports, []
            return reports
        assert self._run is not None
        unit = self._units.popleft()
        try:
            return [Done(0, unit, self._run(unit))]
        except ENDS_RUN:
            raise
        except Exception:
            # whatever a model or a driver throws belongs to this unit alone
            return [Raised(0, unit, traceback.format_exc())]
