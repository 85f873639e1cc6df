"""Every measure of a capture as a table and every figure as a picture, for work outside looptap."""

from pathlib import Path

import pandas as pd
import xarray as xr

from ..errors import FormatError
from .findings import Findings, find
from .tables import tables

TABLE_FORMATS = ("parquet", "csv")
FIGURE_FORMATS = ("png", "svg")
_PNG_SCALE = 2.0  # pixels a point: sharp on paper and on dense screens


def write_analysis(
    store: str | Path | xr.Dataset,
    out_dir: str | Path,
    table_format: str = "parquet",
    figure_format: tuple[str, ...] = FIGURE_FORMATS,
) -> list[Path]:
    """Write the tables and figures of one capture into a directory.

    Args:
        store: path of a store, or a Dataset laid out like one.
        out_dir: made if it is not there; files of the same names are replaced.
        table_format: parquet or csv.
        figure_format: any of png and svg; none for tables alone.
    Returns:
        paths written: `measures` (a row per measure and depth), `verdicts`, `non_finite`, `trajectory`,
        `distinctness` and `cycle` where states are kept, one or several of each analysis that the store can
        answer (such as `limits_share`; `heads` has a row per measure, depth and head, `sequences` one per
        depth of up to sixteen sequences), and one file per figure and format. A capture with several loops
        has a folder for each.
    Raises:
        FormatError: a format is unknown.
        NothingCapturedError: the store has no finished sequence yet.
    """
    _check("table format", [table_format], TABLE_FORMATS)
    _check("figure format", figure_format, FIGURE_FORMATS)
    paths = []
    for findings in find([store]):
        folder = Path(out_dir, findings.loop)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables(findings).items():
            paths.append(_write_table(table, folder / f"{name}.{table_format}"))
        paths += _write_figures(findings, folder, figure_format) if figure_format else []
    return paths


def _write_table(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)
    return path


def _write_figures(findings: Findings, out_dir: Path, formats: tuple[str, ...]) -> list[Path]:
    from .figures.catalogue import FIGURES

    paths = []
    for draw in FIGURES:
        figure = draw([findings])
        if figure is None:
            continue
        for each in formats:
            path = out_dir / f"{figure.name}.{each}"
            figure.chart().save(path, scale_factor=_PNG_SCALE if each == "png" else 1)
            paths.append(path)
    return paths


def _check(what: str, given: list[str] | tuple[str, ...], known: tuple[str, ...]) -> None:
    for each in given:
        if each not in known:
            raise FormatError(f"{each!r} is not a {what}: choose {' or '.join(known)}")
