"""Maps of all pairs of block invocations: where a loop is like itself, and where it is not."""

from collections.abc import Sequence
from functools import partial

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ...capture.store.quantities import QUANTITIES
from ..findings import Findings
from .answer_figures import answer_figure
from .marks import Figure
from .words import number

MAP_HEIGHT = 420  # pixels; beside another capture's a map is about square
MOST_BINS = 128  # cells a side of a map: a page holds as many as a screen can show


def residual_similarity(findings: Sequence[Findings]) -> Figure | None:
    """Cosine of the residuals of every two block invocations (figures 10 and 13 to 15)."""
    return _map_figure(
        findings,
        "residual_similarity",
        "Likeness of residuals, all blocks against all",
        "figures 10 and 13 to 15",
    )


def attention_distance(findings: Sequence[Findings]) -> Figure | None:
    """Distance of the attention matrices of every two block invocations (figures 2 and 16 to 18)."""
    return _map_figure(
        findings,
        "attention_distance",
        "Distance of attention, all blocks against all",
        "figures 2 and 16 to 18",
    )


def _map_figure(findings: Sequence[Findings], name: str, title: str, paper: str) -> Figure | None:
    unit = QUANTITIES[name].unit
    return answer_figure(
        findings,
        name,
        name=name,
        title=title,
        paper=paper,
        table=partial(_map_table, name),
        layers=partial(_map_layers, unit),
        caption="Every block invocation against every other, in the order they run, from the top left. "
        "Stripes that repeat are layers that are themselves again in every recurrence.",
        seen=partial(_map_seen, unit),
        note=_map_note,
        height=MAP_HEIGHT,
    )


def _map_table(name: str, found: xr.Dataset) -> pd.DataFrame:
    """Means over cells; a cell without a finite value is empty."""
    value_DD = found[name].sel(statistic="value").values
    edges = np.linspace(0, len(value_DD), min(len(value_DD), MOST_BINS) + 1).round().astype(int)
    starts, finite_DD = edges[:-1], np.isfinite(value_DD)
    total, count = (
        np.add.reduceat(np.add.reduceat(each, starts, axis=0), starts, axis=1)
        for each in (np.where(finite_DD, value_DD, 0.0), finite_DD.astype(float))
    )
    with np.errstate(invalid="ignore"):
        mean_BB = total / count
    row, column = (each.ravel() for each in np.indices(mean_BB.shape))
    return pd.DataFrame(
        {
            "from": edges[column] - 0.5,
            "to": edges[column + 1] - 0.5,
            "other_from": edges[row] - 0.5,
            "other_to": edges[row + 1] - 0.5,
            "value": mean_BB.ravel(),
        }
    )


def _map_note(found: xr.Dataset) -> str:
    num_depths = found.sizes["depth"]
    if num_depths <= MOST_BINS:
        return ""
    return f"a cell is the mean of {-(-num_depths // MOST_BINS)} depths or fewer a side."


def _map_layers(unit: str, table: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    every = np.concatenate([np.asarray(each["value"], float) for each in tables])
    every = every[np.isfinite(every)]
    domain = [float(every.min()), float(every.max())] if len(every) else [0.0, 1.0]
    scale = {"domain": [-0.5, float(np.max(table["to"]))], "nice": False}
    x = alt.X(
        "from:Q", scale=alt.Scale(**scale), axis=alt.Axis(title="depth (block invocations)", format="d")
    )
    y = alt.Y(
        "other_from:Q",
        scale=alt.Scale(**scale, reverse=True),
        axis=alt.Axis(title="depth", format="d", grid=False),
    )
    shades = alt.Scale(scheme="viridis", domain=domain)
    color = alt.Color("value:Q", title=unit, scale=shades)
    edge = alt.Stroke("value:Q", title=unit, scale=shades)  # or the page shows between neighbours
    tooltip = [
        alt.Tooltip(f"{key}:Q", title=title, format=".4~g")
        for key, title in (("from", "depth from"), ("other_from", "other from"), ("value", unit))
    ]
    marks = alt.Chart().transform_filter("isValid(datum.value)").mark_rect(clip=True, strokeWidth=0.7)
    return [marks.encode(x=x, x2="to:Q", y=y, y2="other_to:Q", color=color, stroke=edge, tooltip=tooltip)]


def _map_seen(unit: str, each: Findings, found: xr.Dataset) -> str:
    same_L, other_L = (found[key].sel(statistic="value").values for key in ("same_layer", "other_layers"))
    if not (np.isfinite(same_L).any() and np.isfinite(other_L).any()):
        return ""
    same, other = (number(float(np.nanmean(each_L))) for each_L in (same_L, other_L))
    return (
        f"In {each.label} a core layer beside itself in other recurrences is at {same} on average, and "
        f"beside the core's other layers in the same one at {other} ({unit})."
    )
