"""What pools of workers report to the scheduler, what it answers, and what a run tells whoever watches it."""

from dataclasses import dataclass

from .work import Receipt


@dataclass(frozen=True)
class Placed:
    """A worker's process runs; it may still have to load its model."""

    worker: int
    where: str
    """Host and process, for people."""


@dataclass(frozen=True)
class Ready:
    """A worker waits for units."""

    worker: int


@dataclass(frozen=True)
class NotStarted:
    """A worker could not be built; it is gone."""

    worker: int
    why: str


@dataclass(frozen=True)
class Done:
    """A unit is in the store."""

    worker: int
    unit: int
    receipt: Receipt


@dataclass(frozen=True)
class Raised:
    """A worker could not capture a unit and goes on with the next."""

    worker: int
    unit: int
    error: str


@dataclass(frozen=True)
class Returned:
    """A worker gives back a unit that it had not begun, as it was told to."""

    worker: int
    unit: int


@dataclass(frozen=True)
class Unavailable:
    """A worker does not answer, and may yet; nothing will be heard of this unit from it."""

    worker: int
    unit: int


@dataclass(frozen=True)
class Available:
    """A worker that did not answer does."""

    worker: int


@dataclass(frozen=True)
class Died:
    """A worker is gone."""

    worker: int
    why: str


Report = Placed | Ready | NotStarted | Done | Raised | Returned | Unavailable | Available | Died


@dataclass(frozen=True)
class Start:
    """Start a worker of this number."""

    worker: int


@dataclass(frozen=True)
class Give:
    """Give a worker a unit, behind those it has."""

    worker: int
    unit: int
    again: bool
    """It was given before, so it may be committed by now."""


@dataclass(frozen=True)
class Kill:
    """End a worker, whatever it does."""

    worker: int


@dataclass(frozen=True)
class UnitDone:
    """A unit was committed."""

    unit: int
    receipt: Receipt


@dataclass(frozen=True)
class UnitFailed:
    """A unit could not be captured, and will not be tried again by this run."""

    unit: int
    error: str
    """The last traceback, or how its workers died."""


@dataclass(frozen=True)
class WorkerJoined:
    """A worker is ready."""

    worker: int
    where: str
    num_workers: int
    """That are ready now."""


@dataclass(frozen=True)
class WorkerLost:
    """A worker is gone, or its units were taken from it because it does not answer."""

    worker: int
    where: str
    why: str
    unit: int | None
    """What it was running."""
    num_workers: int
    """That are left."""


@dataclass(frozen=True)
class WorkerRefused:
    """A worker could not be started."""

    worker: int
    why: str


@dataclass(frozen=True)
class SlowUnit:
    """A unit takes many times what units take; said once."""

    unit: int
    where: str
    seconds: float
    median_s: float


Event = UnitDone | UnitFailed | WorkerJoined | WorkerLost | WorkerRefused | SlowUnit
Command = Start | Give | Kill
