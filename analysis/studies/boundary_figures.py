"""Figures of where random loops converge: the last step over gain and embeddings, and the critical gain."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ..figures.axes import SHORT_LABEL, y_axis
from ..figures.marks import DEPTH_COLOR, Figure, Panel
from ..figures.words import number
from ..thresholds import CONVERGED_STEP
from .architecture_axes import (
    WORDS,
    color_of,
    column,
    label_of,
    near_the_paper,
    panels_of,
    values_of,
    varying,
)
from .architecture_study import ArchitectureStudy
from .boundary import AXES_BUT_GAIN, ROUNDING

# from a loop that stands still, over the threshold, to one whose every step is as long as its state
_MAP_STOPS = [ROUNDING, 1e-5, CONVERGED_STEP, 3e-2, 1.0]
_MAP_COLORS = ["#2a3a8c", "#2c93a8", "#f4f3ef", "#e39a2d", "#bf3f55"]
_INK = "#23231f"
_MAP_HEIGHT = 330
_FOOT = 1.4  # factor from a lone value on an axis to the edges of its cells


def convergence_map(study: ArchitectureStudy) -> Figure | None:
    """The last step over gain and embeddings, a panel for norms, injection and width; none where neither gain
    nor embeddings vary.
    """
    table, fixed = near_the_paper(study.combinations, ["layers", "recurrences"])
    if not {"gain", "embedding_std"} & set(varying(table)):
        return None
    table = _with_cells(table)
    panels, tables = [], {}
    for (injection, norm, width), part in panels_of(table, "width"):
        label = f"{label_of(norm, injection)}, width {width}"
        tables[f"map {label}"] = part
        panels.append(_map_panel(label, part, _line_in(study.boundary, part), table))
    widths = len(values_of(table, "width"))
    return Figure(
        name="convergence_map",
        title="Where the loop converges",
        paper="",
        subtitle="last step, median over tokens in the slowest layer and over seeds; in cells: seeds that "
        f"converge; line: where it is {number(CONVERGED_STEP)}{fixed}",
        columns=min(3, widths if widths > 1 else len(panels)),
        panels=panels,
        tables=tables,
        caption=[
            "Blue: the loop stands still after its last recurrence; amber and red: it still moves. Bars: the "
            "line's points of all seeds. One seed may "
            "converge where the median does not, and the reverse.",
            *_map_seen(table),
        ],
        notes=["No point of the line is drawn where the median over seeds is beyond the grid's gains."],
    )


def _with_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the same table with each cell's words and edges."""
    counts = zip(table["converged"], table["seeds"], strict=True)
    table = table.assign(answer=[f"{converged}/{seeds}" for converged, seeds in counts])
    for name in ("gain", "embedding_std"):
        edges = _edges(values_of(table, name))
        for index, end in enumerate(("from", "to")):
            table[f"{name}_{end}"] = [edges[value][index] for value in column(table, name).tolist()]
    return table


def _edges(values: Sequence[float]) -> dict[float, tuple[float, float]]:
    """Returns where each value's cell begins and ends: half way to its neighbours, by factors."""
    at = np.array(values, float)
    between = np.sqrt(at[1:] * at[:-1])
    first = at[0] ** 2 / between[0] if len(at) > 1 else at[0] / _FOOT
    last = at[-1] ** 2 / between[-1] if len(at) > 1 else at[-1] * _FOOT
    ends = [float(first), *between.tolist(), float(last)]
    return dict(zip(values, pairwise(ends), strict=True))


def _line_in(boundary: pd.DataFrame, part: pd.DataFrame) -> list[dict[str, Any]]:
    """The critical gains inside a panel's grid, with their spread as far as it is in there."""
    if not len(boundary):
        return []
    axes = part[AXES_BUT_GAIN].drop_duplicates()
    here = boundary.merge(axes, on=AXES_BUT_GAIN).to_dict("records")
    ends = {"low": column(part, "gain_from").min(), "high": column(part, "gain_to").max()}
    return [
        {"embedding_std": row["embedding_std"], "critical_gain": row["critical_gain"], **_spread(row, ends)}
        for row in here
        if np.isfinite(row["critical_gain"])
    ]


def _spread(row: Mapping[Any, Any], ends: Mapping[str, float]) -> dict[str, float]:
    """Least and largest critical gain of any seed, or where the picture ends."""
    found = {end: float(row[f"critical_gain_{end}"]) for end in ends}
    return {end: value if np.isfinite(value) else float(ends[end]) for end, value in found.items()}


def _map_panel(label: str, part: pd.DataFrame, line: list[dict[str, Any]], table: pd.DataFrame) -> Panel:
    x, y = (_map_axis(name, table) for name in ("gain", "embedding_std"))
    scale = alt.Scale(type="log", domain=_MAP_STOPS, range=_MAP_COLORS, clamp=True, interpolate="rgb")
    title = "last step (share of the norm)"
    legend = alt.Legend(title=title, values=_MAP_STOPS[1:], labelExpr=SHORT_LABEL)
    cells = alt.Chart().mark_rect(stroke="#ffffff", strokeWidth=1, clip=True)
    cells = cells.encode(
        x=alt.X("gain_from:Q", **x),
        x2="gain_to:Q",
        y=alt.Y("embedding_std_from:Q", **y),
        y2="embedding_std_to:Q",
        color=alt.Color("last_step:Q", scale=scale, legend=legend),
    )
    above = min(10.0, _MAP_HEIGHT / len(values_of(table, "embedding_std")) / 6)  # the line
    dark = f"datum.last_step > 0.2 || datum.last_step < {_MAP_STOPS[1] / 4}"
    words = (
        alt.Chart()
        .mark_text(fontSize=10.5, dy=-above)
        .encode(
            x=alt.X("gain:Q", **x),
            y=alt.Y("embedding_std:Q", **y),
            text="answer:N",
            color=alt.condition(dark, alt.value("#ffffff"), alt.value("#33332f")),
        )
    )
    names = ("gain", "embedding_std", "last_step", "converged", "seeds")
    near = [alt.Tooltip(f"{name}:Q", title=name.replace("_", " "), format=".3~g") for name in names]
    edges = [f"{name}_{end}" for name in ("gain", "embedding_std") for end in ("from", "to")]
    return Panel(
        label=label,
        data=f"map {label}",
        columns=(*names, "answer", *edges),
        layers=[cells, *(_boundary_marks(line, x, y) if line else []), words],
        hover=[cells.encode(tooltip=near, opacity=alt.value(0))],
        height=_MAP_HEIGHT,
    )


def _boundary_marks(line: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any]) -> list[alt.Chart]:
    base = alt.Chart(alt.InlineData(values=line)).encode(y=alt.Y("embedding_std:Q", **y))
    at = base.encode(x=alt.X("critical_gain:Q", **x), order="embedding_std:Q")
    spread = base.mark_rule(strokeWidth=1.2, color=_INK, clip=True)
    return [
        spread.encode(x=alt.X("low:Q", **x), x2="high:Q"),
        at.mark_line(strokeWidth=2, color=_INK, clip=True),
        at.mark_point(filled=True, size=30, color=_INK, opacity=1),
    ]


def _map_axis(name: str, table: pd.DataFrame) -> dict[str, Any]:
    domain = [float(column(table, f"{name}_from").min()), float(column(table, f"{name}_to").max())]
    axis = alt.Axis(title=WORDS[name], values=values_of(table, name), format="~g", grid=False, ticks=False)
    return {"axis": axis, "scale": alt.Scale(type="log", domain=domain, nice=False)}


def _map_seen(table: pd.DataFrame) -> list[str]:
    """Says how many captures of each panel converge."""
    said = []
    for (injection, norm, width), part in panels_of(table, "width"):
        seeds, converged = (int(column(part, name).sum()) for name in ("seeds", "converged"))
        said.append(f"{label_of(norm, injection)}, width {width}: {converged} of {seeds} captures converge.")
    return said


def convergence_boundary(study: ArchitectureStudy) -> Figure | None:
    """The gain at which convergence ends, over embeddings or width; none where neither varies."""
    if not len(study.boundary):
        return None
    table, fixed = near_the_paper(study.boundary, ["layers", "recurrences"])
    over = [name for name in ("embedding_std", "width") if len(values_of(table, name)) > 1]
    if not over:
        return None
    gains = values_of(study.captures, "gain")
    domain = (gains[0] / 1.08, gains[-1] * 1.08)
    panels, tables = [], {}
    for (injection, norm), part in panels_of(table):
        label = label_of(norm, injection)
        ends: dict[str, float] = {"low": domain[0], "high": domain[1]}
        rows = [row | _spread(row, ends) for row in part.to_dict("records") if row["inside"]]
        tables[f"boundary {label}"] = pd.DataFrame(rows, columns=[*part.columns, *ends])
        panels.append(_boundary_panel(label, over, table, gains, domain))
    return Figure(
        name="convergence_boundary",
        title="The critical gain",
        paper="",
        subtitle=f"gain at which the last step is {number(CONVERGED_STEP)} of the norm; point: median over "
        f"seeds, bar: all of them{fixed}",
        columns=min(3, len(panels)),
        panels=panels,
        tables=tables,
        caption=_boundary_seen(table),
        notes=["Dashed: the least and the largest gain of the grid; what lies beyond is not drawn."],
    )


def _boundary_panel(
    label: str,
    over: Sequence[str],
    table: pd.DataFrame,
    gains: Sequence[float],
    domain: tuple[float, float],
) -> Panel:
    at = values_of(table, over[0])
    axis = alt.Axis(title=WORDS[over[0]], values=at, format="~g")
    scale = alt.Scale(type="log", domain=[at[0] / _FOOT, at[-1] * _FOOT], nice=False)
    y = y_axis("critical gain", domain, log=True)
    y["axis"] = alt.Axis(title="critical gain", values=list(gains), format="~g")
    color = color_of("width", values_of(table, "width")) if len(over) > 1 else alt.value(DEPTH_COLOR)
    base = alt.Chart().encode(x=alt.X(f"{over[0]}:Q", axis=axis, scale=scale), color=color)
    edges = alt.Chart(alt.InlineData(values=[{"at": gains[0]}, {"at": gains[-1]}]))
    rule = edges.mark_rule(strokeDash=[3, 3], color="#8c8b85").encode(y=alt.Y("at:Q", **y))
    spread = base.mark_rule(strokeWidth=1.4, opacity=0.55)
    spread = spread.encode(y=alt.Y("low:Q", **y), y2="high:Q")
    line = base.transform_filter("isValid(datum.critical_gain)").encode(y=alt.Y("critical_gain:Q", **y))
    points = line.mark_point(filled=True, size=40, opacity=1)
    near = ("critical_gain", "critical_gain_low", "critical_gain_high", "width", "embedding_std")
    tooltip = [alt.Tooltip(f"{name}:Q", title=name.replace("_", " "), format=".3~g") for name in near]
    return Panel(
        label=label,
        data=f"boundary {label}",
        columns=(*near, "low", "high"),
        layers=[rule, spread, line.mark_line(strokeWidth=1.6), points],
        hover=[points.encode(tooltip=tooltip)],
    )


def _boundary_seen(table: pd.DataFrame) -> list[str]:
    """Says what is drawn, and the least and largest median of each panel."""
    drawn = (
        "Above a point the loop does not converge, below it does: found between two gains of the grid, the "
        "logarithm of the last step taken as linear in the logarithm of the gain."
    )
    said = []
    for (injection, norm), part in panels_of(table):
        found = column(part, "critical_gain")
        label, num_inside = label_of(norm, injection), int(np.isfinite(found).sum())
        text = f"{label}: {num_inside} of {len(found)} medians are inside the grid"
        if num_inside:
            text += f", from {number(float(np.nanmin(found)))} to {number(float(np.nanmax(found)))}"
        said.append(f"{text}.")
    return [drawn, *said]
