"""The architecture study's figures, and the first of them: how far from their end loops are.

What a figure does not vary stands in its subtitle; of an axis with several values it takes the one nearest to
the paper's.
"""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from ..figures.axes import value_domain, y_axis
from ..figures.marks import Figure, Panel
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
from .boundary_figures import convergence_boundary, convergence_map

# a line for each value of the first of these that has several
_LINES = ("layers", "gain", "embedding_std", "width", "recurrences")
_HEIGHT = 290  # room for the legend too


def figures_of(study: ArchitectureStudy) -> list[Figure]:
    """Makes the figures that the study's grid has something for."""
    drawn = [distance_by_recurrence(study), convergence_map(study), convergence_boundary(study)]
    return [figure for figure in drawn if figure is not None]


def distance_by_recurrence(study: ArchitectureStudy) -> Figure:
    """Distance to where the loop ends, a panel for norms and injection (figures 6, 29, 30, 31)."""
    several = varying(study.distances)
    group = next((name for name in _LINES if name in several), "layers")
    table, fixed = near_the_paper(study.distances, [name for name in WORDS if name != group])
    value, low, high = (column(table, f"distance{end}") for end in ("", "_low", "_high"))
    domain = value_domain([value, low, high], [], log=True)
    table = table.assign(distance_low=np.maximum(low, domain[0]))  # a log axis has no 0
    panels, tables = [], {}
    for (injection, norm), part in panels_of(table):
        label = label_of(norm, injection)
        tables[f"distance {label}"] = part
        panels.append(_distance_panel(label, part, group, values_of(table, group), domain))
    return Figure(
        name="distance_by_recurrence",
        title="Distance to the last state",
        paper="figures 6, 29, 30 and 31",
        subtitle="median over tokens in the slowest layer; line: median over seeds, shaded: all of them"
        + fixed,
        columns=min(3, len(values_of(table, "norm"))),
        panels=panels,
        tables=tables,
        caption=_distance_seen(study),
    )


def _distance_panel(
    label: str, part: pd.DataFrame, group: str, values: Sequence[float], domain: tuple[float, float]
) -> Panel:
    y = y_axis("distance (share of the norm)", domain, log=True)
    x = alt.X(
        "recurrence:Q",
        axis=alt.Axis(title="recurrence", tickMinStep=1, format="d"),
        scale=alt.Scale(domain=[0, max(1, int(column(part, "recurrence").max()))], nice=False),
    )
    base = alt.Chart().transform_filter("datum.distance > 0").encode(x=x, color=color_of(group, values))
    area = base.mark_area(opacity=0.16, clip=True)
    area = area.encode(y=alt.Y("distance_low:Q", **y), y2="distance_high:Q")
    at = base.encode(y=alt.Y("distance:Q", **y))
    tooltip = [alt.Tooltip(f"{each}:Q", format="~g") for each in ("recurrence", group)]
    titles = {"": "distance", "_low": "least", "_high": "largest"}
    tooltip += [alt.Tooltip(f"distance{end}:Q", title=title, format=".3~g") for end, title in titles.items()]
    points = at.mark_point(filled=True, size=40, opacity=0).encode(tooltip=tooltip)
    return Panel(
        label=label,
        data=f"distance {label}",
        columns=("recurrence", group, "distance", "distance_low", "distance_high"),
        layers=[area, at.mark_line(strokeWidth=1.6, clip=True)],
        hover=[points],
        height=_HEIGHT,
    )


def _distance_seen(study: ArchitectureStudy) -> list[str]:
    """What is drawn, and what became of all combinations of one panel."""
    drawn = (
        "How far the residual is from where the last recurrence leaves it. A loop that converges falls to "
        "what rounding makes of it and stays; one that does not only comes near when the end is near."
    )
    said = []
    for (injection, norm), part in panels_of(study.combinations):
        seeds, converged, distinct = (
            int(column(part, name).sum()) for name in ("seeds", "converged", "distinct")
        )
        text = f"{label_of(norm, injection)}: {converged} of {seeds} captures converge"
        said.append(
            f"{text}, {distinct} of them with a fixed point for each layer." if converged else f"{text}."
        )
    return [drawn, *said]
