"""Saves figures as files."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import os_errors_named

if TYPE_CHECKING:  # what draws loads for long, and names of formats are asked for before
    from .marks import Figure

FIGURE_FORMATS = ("png", "svg")
_PNG_SCALE = 2.0  # pixels a point: sharp on paper and on dense screens


def save_figures(
    figures: Iterable["Figure"], out_dir: Path, formats: Iterable[str] = FIGURE_FORMATS
) -> list[Path]:
    """Writes each figure into a directory that exists, in each of the formats (any of `FIGURE_FORMATS`).

    Returns:
        paths written, named after the figures.
    """
    paths, formats = [], tuple(formats)
    for figure in figures:
        for each in formats:
            paths.append(out_dir / f"{figure.name}.{each}")
            with os_errors_named(paths[-1], "written"):
                figure.chart().save(paths[-1], scale_factor=_PNG_SCALE if each == "png" else 1)
    return paths
