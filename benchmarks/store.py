"""Every goal of the store in one run: writing (S1 to S5), reading (S6 to S11, S14), commits and resuming
(S13, S15), and kills (S12), each beside the disk or the library that it is held against.

What each part times, and why it costs what it costs, is said in its own module. Within a part all that is
compared takes turns, and ratios are of one round: what a shared machine does meanwhile slows all of them.
"""

from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

Part = Literal["writing", "reading", "protocol", "chaos"]


@dataclass(frozen=True, kw_only=True)
class StoreBench:
    """The store beside raw writing and mapping, zarr-python, zarrs and tensorstore."""

    parts: Annotated[tuple[Part, ...], tyro.conf.arg(metavar="PART [PART ...]")] = (
        "writing",
        "reading",
        "protocol",
        "chaos",
    )
    """What to measure: writing, reading, protocol, chaos."""
    directory: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """On the disk to measure; a temporary directory if not given."""
    repeats: int = 5
    """Rounds, of which the median counts."""
    megabytes: int = 1024
    """States of one write, and of the store that is read, in MiB."""
    kills: int = 20
    """Processes that the chaos part kills."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Sequences whose lengths show how much of a store is padding (S10); the demo's prompts if not given."""
    field: str = "text"
    """Field of a .jsonl that holds the text."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A tokenizer.json for it; bytes if not given."""

    def __post_init__(self) -> None:
        for name in ("repeats", "megabytes", "kills"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")


def bench_store(settings: StoreBench) -> None:
    """Runs the parts and prints one table and a line of JSON."""
    from .goals import Figure, print_figures

    modules = {name: "chaos" if name == "chaos" else f"store_{name}" for name in settings.parts}
    figures: list[Figure] = []
    for name, module in modules.items():
        print(f"measuring {name}", flush=True)
        figures += import_module(f".{module}", __package__).measure(settings)
    figures.sort(key=lambda figure: int(figure.name.lstrip("S").split()[0]))
    record = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }
    libraries = ("numpy", "zarr", "zarrs", "tensorstore", "xarray", "dask", "safetensors", "obstore")
    print_figures("the store", figures, libraries, benchmark="store", settings=record)
