"""Measures as tables: one for figures, a row a depth, and one for files, a row a measure and depth."""

from typing import Any

import pandas as pd
import xarray as xr

from .depth_axis import depths_of
from .measures import MEASURES


def depth_table(measures: xr.Dataset) -> pd.DataFrame:
    """Returns a row per depth: stage, layer, recurrence, and every measure with `_low` and `_high`."""
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
    """Returns a row per measure and depth: value, band, number of sequences, unit and definition."""
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
