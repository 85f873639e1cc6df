"""Every measure of a capture as a table and every figure as a picture, for work outside looptap."""

from pathlib import Path

import pandas as pd
import xarray as xr

from ..errors import CannotTellError, FormatError, os_errors_named
from .answers import heads
from .answers import single_sequences as sequences
from .depth_tables import long_table
from .figures.pictures import FIGURE_FORMATS, save_figures
from .findings import Findings, find
from .registry import ANALYSES

_TOGETHER = {"heads": heads, "sequences": sequences}  # modules whose analyses make one table
TABLE_FORMATS = ("parquet", "csv")


def write_analysis(
    store: str | Path | xr.Dataset,
    out_dir: str | Path,
    table_format: str = "parquet",
    figure_format: tuple[str, ...] = FIGURE_FORMATS,
) -> list[Path]:
    """Writes the tables and figures of one capture into a directory.

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
    out_dir, paths = Path(out_dir), []
    with os_errors_named(out_dir, "written"):
        for findings in find([store]):
            folder = out_dir / findings.loop
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in tables(findings).items():
                paths.append(_write_table(table, folder / f"{name}.{table_format}"))
            paths += _write_figures(findings, folder, figure_format) if figure_format else []
    return paths


def tables(findings: Findings) -> dict[str, pd.DataFrame]:
    """Returns all numbers of one capture as tables, by name."""
    wrong = findings.measures["non_finite"].to_dataframe().reset_index()
    result = {
        "measures": long_table(findings.measures),
        "verdicts": pd.DataFrame([verdict.row() for verdict in findings.verdicts]),
        "non_finite": wrong[wrong["non_finite"] > 0].reset_index(drop=True),
    }
    alone = set(findings.answers) - {each.name for part in _TOGETHER.values() for each in part.ANALYSES}
    for name, found in findings.answers.items():
        if isinstance(found, xr.Dataset) and name in alone:
            own = ANALYSES[name].tables
            result |= _by_variable(name, found) if own is None else own(found)
    for name, part in _TOGETHER.items():
        try:
            result[name] = part.long_table(part.gathered(findings.answers))
        except CannotTellError:
            continue  # why stands in the report, with every measure that is missing
    return result


def _by_variable(name: str, found: xr.Dataset) -> dict[str, pd.DataFrame]:
    """Returns a table for each variable of an analysis, or the one table; statistics as columns."""
    tables = {}
    for variable, values in found.data_vars.items():
        if "statistic" in values.dims:
            columns = {str(each): values.sel(statistic=each, drop=True) for each in found["statistic"].values}
            table = xr.Dataset(columns)
        else:
            table = values.to_dataset(name="value")
        frame = table.to_dataframe() if table.dims else pd.DataFrame([table.to_pandas()])
        key = name if len(found.data_vars) == 1 else f"{name}_{variable}"
        tables[key] = frame.reset_index(drop=not table.dims)
    return tables


def _write_table(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)
    return path


def _write_figures(findings: Findings, out_dir: Path, formats: tuple[str, ...]) -> list[Path]:
    from .figures.catalogue import FIGURES

    drawn = (figure for draw in FIGURES if (figure := draw([findings])) is not None)
    return save_figures(drawn, out_dir, formats)


def _check(what: str, given: list[str] | tuple[str, ...], known: tuple[str, ...]) -> None:
    for each in given:
        if each not in known:
            raise FormatError(f"{each!r} is not a {what}: choose {' or '.join(known)}")
