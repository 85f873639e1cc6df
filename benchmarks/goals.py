"""Figures beside what they must reach, as one table and one line of JSON; shared by the benchmarks."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and its goal."""

    name: str
    """Name of the goal, such as S1."""
    what: str
    """The thing that was measured, with its unit or as what ratio."""
    seen: float | None
    """Measured number; None where this machine cannot show it, and `detail` says why."""
    must: float
    stretch: float | None = None
    better: Literal["higher", "lower"]
    detail: str = ""
    """The numbers behind it."""

    @property
    def verdict(self) -> str:
        """stretch, must, missed or not shown."""
        if self.seen is None:
            return "not shown"
        sign = 1 if self.better == "higher" else -1
        if self.stretch is not None and sign * self.seen >= sign * self.stretch:
            return "stretch"
        return "must" if sign * self.seen >= sign * self.must else "missed"


def print_figures(title: str, figures: Sequence[Figure], libraries: Sequence[str], **more: Any) -> None:
    """Prints the table, then one line of JSON with the figures, versions and `more`."""
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in ("", "what", "seen", "must", "stretch", "verdict"):
        table.add_column(column, justify="right" if column in ("seen", "must", "stretch") else "left")
    for figure in figures:
        table.add_row(
            figure.name,
            figure.what + (f"\n[dim]{figure.detail}[/dim]" if figure.detail else ""),
            "-" if figure.seen is None else f"{figure.seen:.3g}",
            f"{'≥' if figure.better == 'higher' else '≤'} {figure.must:g}",
            "" if figure.stretch is None else f"{figure.stretch:g}",
            figure.verdict,
        )
    Console().print(table)
    record = {
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in libraries},
        **more,
    }
    print(json.dumps(record))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
