"""Maps of all pairs of block invocations: where a loop is like itself, and where it is not."""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..findings import Findings
from .answer_figures import counts_of, drawn_of
from .marks import Figure, Panel
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
    drawn, absent = drawn_of(findings, name)
    if not drawn:
        return None
    tables, notes, values = {}, [], []
    for each, found in drawn:
        value_DD = found[name].sel(statistic="value").values
        edges = np.linspace(0, len(value_DD), min(len(value_DD), MOST_BINS) + 1).round().astype(int)
        tables[f"{name} {each.label}"] = table = _map_table(value_DD, edges)
        values.append(np.asarray(table["value"], float))
        if len(edges) <= len(value_DD):
            most = -(-len(value_DD) // MOST_BINS)
            notes.append(f"{each.label}: a cell is the mean of {most} depths or fewer a side.")
    every = np.concatenate(values)
    every = every[np.isfinite(every)]
    domain = [float(every.min()), float(every.max())] if len(every) else [0.0, 1.0]
    unit = drawn[0][1][name].attrs["units"]
    panels = [
        Panel(
            label=each.label,
            data=f"{name} {each.label}",
            columns=("from", "to", "other_from", "other_to", "value"),
            layers=[_map_layer(len(each.depths), domain, unit)],
            height=MAP_HEIGHT,
        )
        for each, _ in drawn
    ]
    caption = "Every block invocation against every other, in the order they run, from the top left. "
    caption += "Stripes that repeat are layers that are themselves again in every recurrence."
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=counts_of(drawn),
        columns=len(panels),
        panels=panels,
        tables=tables,
        absent=absent,
        notes=notes,
        caption=[caption, *filter(None, (_map_seen(each, found, unit) for each, found in drawn))],
    )


def _map_table(value_DD: np.ndarray, edges: np.ndarray) -> pd.DataFrame:
    """Means over cells; a cell without a finite value is empty."""
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


def _map_layer(num_depths: int, domain: list[float], unit: str) -> alt.Chart:
    scale = {"domain": [-0.5, num_depths - 0.5], "nice": False}
    x = alt.X(
        "from:Q", scale=alt.Scale(**scale), axis=alt.Axis(title="depth (block invocations)", format="d")
    )
    y = alt.Y("other_from:Q", scale=alt.Scale(**scale, reverse=True),
              axis=alt.Axis(title="depth", format="d", grid=False))  # fmt: skip
    shades = alt.Scale(scheme="viridis", domain=domain)
    color = alt.Color("value:Q", title=unit, scale=shades)
    edge = alt.Stroke("value:Q", title=unit, scale=shades)  # or the page shows between neighbours
    tooltip = [
        alt.Tooltip(f"{key}:Q", title=title, format=".4~g")
        for key, title in (("from", "depth from"), ("other_from", "other from"), ("value", unit))
    ]
    marks = alt.Chart().transform_filter("isValid(datum.value)").mark_rect(clip=True, strokeWidth=0.7)
    return marks.encode(x=x, x2="to:Q", y=y, y2="other_to:Q", color=color, stroke=edge, tooltip=tooltip)


def _map_seen(each: Findings, found: xr.Dataset, unit: str) -> str:
    same_L, other_L = (found[key].sel(statistic="value").values for key in ("same_layer", "other_layers"))
    if not (np.isfinite(same_L).any() and np.isfinite(other_L).any()):
        return ""
    same, other = (number(float(np.nanmean(each_L))) for each_L in (same_L, other_L))
    return (
        f"In {each.label} a core layer beside itself in other recurrences is at {same} on average, and "
        f"beside the core's other layers in the same one at {other} ({unit})."
    )
