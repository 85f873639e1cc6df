"""Every goal of the store in one run: writing (S1 to S5), reading (S6 to S11, S14), commits and resuming
(S13, S15), and kills (S12), each beside the disk or the library that it is held against.

What each part times, and why it costs what it costs, is said in its own module. Within a part all that is
compared takes turns, and ratios are of one round: what a shared machine does meanwhile slows all of them.
"""

from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..errors import UnavailableError
from .bench_settings import StoreBench


def bench_store(settings: StoreBench) -> None:
    """Runs the parts and prints one table and a line of JSON."""
    from .goals import Figure, print_figures

    if "chaos" in settings.parts and find_spec("psutil") is None:
        raise UnavailableError(
            "the part chaos needs psutil: pip install psutil, or give --parts writing reading protocol"
        )
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
