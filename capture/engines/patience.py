"""How long a run waits: for an answer, for a worker, and for a unit by what others took."""

from collections import deque
from dataclasses import dataclass
from statistics import median

from ...errors import NoWorkersError

MAX_TRIES = 3
_MIN_TIMES = 5  # fewer tell nothing


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of time and number by which a run judges its workers."""

    depth: int = 2
    """Most units that a worker holds, including the one that it runs."""
    reissue_s: float = 2.5
    """Time without an answer after which a worker's units go to others."""
    lost_s: float = 30.0
    """Time without an answer after which a worker is killed."""
    retry_s: float = 60.0
    """Time before workers are started again after several in a row could not be started."""
    no_worker_s: float = 600.0
    """Longest wait for a worker while there is none."""
    slow_ratio: float = 10.0
    """Multiple of the median time from which on a unit is slow, if it takes `slow_s` too."""
    slow_s: float = 20.0
    """Time below which no unit is slow: less than that a new worker, which loads its model, costs as well."""
    grace_s: float = 5.0
    """Time that a worker has to give up a slow unit once another worker has committed it."""
    frozen_s: float = 600.0
    """Time below which no worker is killed for a unit that takes `slow_ratio`² times the median; also what a
    unit takes before it is slow while too few are done to tell."""
    unknown_s: float = 3600.0
    """Time after which a worker is killed for one unit while too few are done to tell."""
    unit_limit_s: float | None = None
    """Longest time of one unit; a worker that takes longer is killed."""


class Pace:
    """The times of the last units, and what they say of one that still runs."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._seconds: deque[float] = deque(maxlen=101)
        self.median_s: float | None = None
        """Median time of a unit; None while too few are done to tell."""

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        if len(self._seconds) >= _MIN_TIMES:
            self.median_s = median(self._seconds)

    def slow_s(self) -> float:
        """Returns the time after which a unit goes to a second worker."""
        if self.median_s is None:
            return self._limits.frozen_s
        return max(self._limits.slow_s, self._limits.slow_ratio * self.median_s)

    def frozen_s(self, num_deaths: int) -> float:
        """Returns the time after which a unit's worker is killed, whoever else has the unit.

        It doubles with each worker that the unit has lost: a long one that is honest comes through.
        """
        limits = self._limits
        if self.median_s is None:
            return limits.unknown_s * 2**num_deaths
        return max(limits.frozen_s, limits.slow_ratio**2 * self.median_s) * 2**num_deaths


class Recruits:
    """Workers that could not be started, and whether it is worth to try again."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._num_refused = 0  # workers refused since one was ready
        self._num_stillborn = 0  # workers that died before they were ready, since one was
        self._last_refusal = ""
        self._refused_s = 0.0
        self._alone_since_s: float | None = None

    def joined(self) -> None:
        self._num_refused = self._num_stillborn = 0

    def refused(self, why: str, now_s: float, *, died: bool) -> None:
        if died:
            self._num_stillborn += 1
        else:
            self._num_refused += 1
        self._last_refusal, self._refused_s = why, now_s

    def may_start(self, now_s: float) -> bool:
        return not self._is_hopeless or now_s - self._refused_s >= self._limits.retry_s

    def check(self, has_worker: bool, num_left: int, now_s: float) -> None:
        """Raises NoWorkersError if there has been no worker for too long, or none can be started.

        Args:
            has_worker: whether there is one, or one that will be.
            num_left: units that are not done.
        """
        if has_worker:
            self._alone_since_s = None
            return
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        left = f"{num_left} units are not done; the same command goes on with them"
        if self._is_hopeless:
            raise NoWorkersError(
                f"no worker could be started in {self._num_refused + self._num_stillborn} tries, and {left}; "
                f"the last one: {self._last_refusal}"
            )
        if now_s - self._alone_since_s >= self._limits.no_worker_s:
            raise NoWorkersError(
                f"no worker is left and none came for {self._limits.no_worker_s:.0f} s; {left}"
            )

    @property
    def _is_hopeless(self) -> bool:
        """Whether starting workers is given up; deaths may come from outside, so more of them are allowed."""
        return self._num_refused >= MAX_TRIES or self._num_stillborn >= 3 * MAX_TRIES
