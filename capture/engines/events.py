"""Reports of workers to the scheduler, its commands to them, and events of a run for whoever watches it.

Events have a JSON form, for whoever watches from another process.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Self

from ...errors import RequestError


@dataclass(frozen=True)
class Receipt:
    """Summary of a committed unit, from its ledger entry."""

    num_tokens: int = 0
    num_bytes: int = 0
    num_non_finite: int = 0

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        """The receipt of a unit's ledger entry."""
        from ..store.writing.commit import (
            entry_bytes,
        )  # zarr, which a worker loads after it says that it lives

        return cls(
            num_tokens=entry["num_tokens"],
            num_bytes=entry_bytes(entry),
            num_non_finite=sum(entry["non_finite"].values()),
        )


@dataclass(frozen=True)
class Placed:
    """A worker's process runs; it may still have to load its model."""

    worker: int
    where: str
    """Host and process, as text for people."""


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
    """A worker gave back a unit that it had not begun, because it was told to."""

    worker: int
    unit: int


@dataclass(frozen=True)
class Unavailable:
    """A worker does not answer, and may yet; it will report nothing of this unit."""

    worker: int
    unit: int


@dataclass(frozen=True)
class Available:
    """A worker that did not answer before answers again."""

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
    """Whether the unit was given to a worker before, so that it may be committed by now."""


@dataclass(frozen=True)
class Kill:
    """End a worker, whatever it does."""

    worker: int


@dataclass(frozen=True)
class Event:
    """An event of a run; every kind of event holds numbers, text and receipts."""

    def to_json(self) -> dict[str, Any]:
        """Returns a dictionary for `json.dumps`: `kind`, such as unit_done, and the fields by name."""
        return {"kind": _kind(type(self)), **asdict(self)}

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Event":
        """Returns the event that `to_json` made this dictionary of.

        Raises:
            RequestError: there is no event of that kind, or it has other fields.
        """
        kinds = {_kind(event): event for event in Event.__subclasses__()}
        fields = {name: value for name, value in document.items() if name != "kind"}
        try:
            if "receipt" in fields:
                fields["receipt"] = Receipt(**fields["receipt"])
            return kinds[document["kind"]](**fields)
        except (KeyError, TypeError) as error:
            raise RequestError(f"{document} is no event of a run: {error}") from error


@dataclass(frozen=True)
class RunBegan(Event):
    """A run began: its store exists, and its engine has what it needs."""

    num_units: int
    num_done: int
    """Number of units that were committed before this run."""


@dataclass(frozen=True)
class FilesRestored(Event):
    """Files of an unfinished store that were lost or damaged were written again from the data."""

    files: list[str]
    """Keys in the store."""


@dataclass(frozen=True)
class UnitDone(Event):
    """A unit was committed."""

    unit: int
    receipt: Receipt


@dataclass(frozen=True)
class UnitFailed(Event):
    """A unit could not be captured, and will not be tried again by this run."""

    unit: int
    error: str
    """The last traceback, or how its workers died."""


@dataclass(frozen=True)
class WorkerJoined(Event):
    """A worker is ready."""

    worker: int
    where: str
    num_workers: int
    """Number of workers that are ready now."""


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker is gone, or its units were taken from it because it does not answer."""

    worker: int
    where: str
    why: str
    unit: int | None
    """The unit that it was running."""
    num_workers: int
    """Number of workers that are left."""


@dataclass(frozen=True)
class WorkerRefused(Event):
    """A worker could not be started."""

    worker: int
    why: str


@dataclass(frozen=True)
class SlowUnit(Event):
    """A unit takes many times the median time of a unit, so the next free worker gets it as well; reported
    once for each worker that takes so long.
    """

    unit: int
    where: str
    seconds: float
    median_s: float | None
    """Median time of a unit; None while too few are done to tell."""


Command = Start | Give | Kill


def _kind(event: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", event.__name__).lower()
