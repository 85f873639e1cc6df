"""Results of the kernels' benchmarks: rows of a table, and goals met or missed."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case, timed."""

    group: str
    length: int
    """Tokens of each sequence."""
    case: str
    seconds: float
    ratio: float
    """Ratio of its time to that of the case it is held against."""
    reference: str
    extra_bytes: int | None = None
    """Peak memory of a call beyond its inputs and results."""


@dataclass(frozen=True)
class Goal:
    """A figure and what it is held to."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None
    stretch: float | None = None

    @property
    def is_met(self) -> bool:
        too_much = self.at_most is not None and not self.value <= self.at_most
        too_little = self.at_least is not None and not self.value >= self.at_least
        return not too_much and not too_little

    def __str__(self) -> str:
        bound = f"at most {self.at_most}" if self.at_most is not None else f"at least {self.at_least}"
        return f"{'met   ' if self.is_met else 'MISSED'} {self.name}: {self.value:.3g}, {bound}"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "is_met": self.is_met}


def table(rows: Iterable[Row]) -> list[str]:
    """Returns the table as lines for people."""
    lines = [f"{'':12}{'tokens':>7}  {'':34}{'time':>11}{'ratio':>8}{'extra memory':>15}"]
    for row in rows:
        memory = "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:12.1f} MB"
        lines.append(
            f"{row.group:12}{row.length:>7}  {row.case:34}"
            f"{row.seconds * 1e6:>8.0f} us{row.ratio:>8.2f}{memory:>15}"
        )
    return lines
