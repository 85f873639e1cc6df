"""A store as it was found: what `verify` reports, and what a repair needs to know."""

from dataclasses import dataclass, field
from typing import Any

from ..writing.commit import Store
from .planned_files import Planned


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be; `unit` is None for a file that no unit wrote."""

    unit: int | None
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.unit is None else f' (unit {self.unit})'}: {self.what}"


@dataclass
class Examined:
    """A store as it was found: what `verify_store` reports, and what a repair needs to know."""

    store: Store
    planned: Planned
    done: list[int]
    problems: list[Problem] = field(default_factory=list)
    blocked: list[Problem] = field(default_factory=list)
    """Things that are no files under names of files: nothing can be done before they are moved away."""
    unread: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """Keys of files that killed processes left, which may be removed."""
    drafts: list[str] = field(default_factory=list)
    """Keys of folders in which attempts write, or wrote."""
    foreign: list[str] = field(default_factory=list)
    written: "list[Written]" = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """The record of a file, made when it was written."""

    unit: int | None
    key: str
    num_bytes: int
    pieces: list[list[Any]]
    """[offset, length, crc32c in hex] of all but holes, in file order."""
