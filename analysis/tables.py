"""The numbers of one capture as tables."""

from typing import Any

import pandas as pd
import xarray as xr

from ..errors import CannotTellError
from .answers import heads
from .answers import single_sequences as sequences
from .depths import depths_of
from .findings import Findings
from .measures import MEASURES
from .registry import ANALYSES

_TOGETHER = {"heads": heads, "sequences": sequences}  # whose analyses make one table


def tables(findings: Findings) -> dict[str, pd.DataFrame]:
    """All numbers of one capture, by name of the table."""
    wrong = findings.measures["non_finite"].to_dataframe().reset_index()
    result = {
        "measures": long_table(findings.measures),
        "verdicts": pd.DataFrame([vars(verdict) for verdict in findings.verdicts]),
        "non_finite": wrong[wrong["non_finite"] > 0].reset_index(drop=True),
    }
    alone = set(findings.answers) - {each.name for part in _TOGETHER.values() for each in part.ANALYSES}
    for name, answer in findings.answers.items():
        if isinstance(answer, xr.Dataset) and name in alone:
            own = ANALYSES[name].tables
            result |= _by_variable(name, answer) if own is None else own(answer)
    for name, part in _TOGETHER.items():
        try:
            result[name] = part.long_table(part.gathered(findings.answers))
        except CannotTellError:
            continue  # why stands in the report, with every measure that is missing
    return result


def depth_table(measures: xr.Dataset) -> pd.DataFrame:
    """A row per depth: stage, layer, recurrence, and every measure with `_low` and `_high`."""
    depths = depths_of(measures)
    columns: dict[str, Any] = {
        "depth": measures["depth"].values,
        "stage": [depths.stages[stage] for stage in depths.stage],
        "layer": depths.layer,
        "recurrence": depths.recurrence,
    }
    for name in MEASURES:
        if name in measures:
            value, low, high, _ = measures[name].values
            columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(columns)


def long_table(measures: xr.Dataset) -> pd.DataFrame:
    """A row per measure and depth: value, band, number of sequences, unit and definition."""
    depths = depths_of(measures)
    place = {
        "depth": measures["depth"].values,
        "stage": [depths.stages[stage] for stage in depths.stage],
        "layer": depths.layer,
        "recurrence": depths.recurrence,
    }
    parts = []
    for name in MEASURES:
        if name in measures:
            value, low, high, sequences = measures[name].values
            numbers = {"value": value, "low": low, "high": high, "sequences": sequences.astype(int)}
            about = {key: measures[name].attrs[key] for key in ("units", "fold", "definition")}
            parts.append(pd.DataFrame({"measure": name, **place, **numbers, **about}))
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame({"measure": [], **{key: [] for key in place}})
    )


def _by_variable(name: str, answer: xr.Dataset) -> dict[str, pd.DataFrame]:
    """A table for each variable, or one for an analysis that has a single one; statistics as columns."""
    tables = {}
    for variable, values in answer.data_vars.items():
        if "statistic" in values.dims:
            columns = {
                str(each): values.sel(statistic=each, drop=True) for each in values["statistic"].values
            }
            table = xr.Dataset(columns)
        else:
            table = values.to_dataset(name="value")
        frame = table.to_dataframe() if table.dims else pd.DataFrame([table.to_pandas()])
        key = name if len(answer.data_vars) == 1 else f"{name}_{variable}"
        tables[key] = frame.reset_index(drop=not table.dims)
    return tables
