"""What the analysis of a whole store costs: its time beside reading every array once, and its memory.

How and why it is measured so stands in `analysis_costs.py`.
"""

from dataclasses import asdict
from pathlib import Path

from .bench_settings import AnalysisBench


def bench_analysis(settings: AnalysisBench) -> None:
    """Runs it and prints a table and a line of JSON."""
    from .analysis_costs import measure
    from .goals import print_figures

    record = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }
    libraries = ("numpy", "zarr", "xarray")
    print_figures("the analysis", measure(settings), libraries, benchmark="analysis", settings=record)
