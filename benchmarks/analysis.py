"""What the analysis of a whole store costs: its time beside reading every array once, and its memory.

How and why it is measured so stands in `analysis_costs.py`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class AnalysisBench:
    """Time and memory of analysing a store, beside reading it once."""

    store: Annotated[Path | None, tyro.conf.arg(metavar="STORE")] = None
    """A store to analyse; one is made in a temporary directory if not given."""
    directory: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the temporary store goes."""
    gigabytes: float = 2.0
    """Size of the store that is made, GB of files."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "random:(10,10x32,10),width=72,heads=9"
    """What the store that is made is of; the default has the layers and heads of SmolLM2-135M with a loop."""
    quantities: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        "residual",
        "steps",
        "gaps",
        "attention",
        "lens",
    )
    """Quantities of the store that is made."""
    states: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SELECTION [SELECTION ...]")] = ()
    """States of the store that is made, as a capture takes them, of every token."""
    repeats: int = 3
    """Rounds, of which the median counts."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats is {self.repeats}: give at least 1")
        if not self.gigabytes > 0:
            raise ValueError(f"--gigabytes is {self.gigabytes}: give a size above 0")


def bench_analysis(settings: AnalysisBench) -> None:
    """Runs it and prints a table and a line of JSON."""
    from .analysis_costs import measure
    from .goals import print_figures

    record = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }
    libraries = ("numpy", "zarr", "xarray")
    print_figures("the analysis", measure(settings), libraries, benchmark="analysis", settings=record)
