"""The figure of paths: one token's residual through the core, joined in the order the blocks run."""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from .axes import SHORT_LABEL
from .choices import ALL, EVERYWHERE, FADED, fading, is_shown
from .findings import Findings
from .marks import DEPTH_COLOR, Figure, Panel, color_by, color_scale
from .panels import group_domain


def path_figure(findings: Sequence[Findings], *, name: str, title: str, paper: str) -> Figure | None:
    """One panel a capture: a token's points joined in the order the blocks run, coloured by layer."""
    drawn = [(each, each.trajectory) for each in findings if not isinstance(each.trajectory, str)]
    if not drawn:
        return None
    domain = group_domain([each for each, _ in drawn], "layer")
    panels, tables, tokens = [], {}, []
    for each, path in drawn:
        table, axes = _path_table(path)
        data = f"path {each.label}"
        tables[data] = table
        columns, last = tuple(table.columns), int(path["recurrence"].max())
        panels.append(
            Panel(
                label=each.label,
                data=data,
                columns=columns,
                layers=_path_layers(axes, last, domain),
                chosen=dict.fromkeys(EVERYWHERE, ALL),
            )
        )
        tokens.append(f"sequence {path.attrs['sequence_id']} (position {path.attrs['token_position']})")
    tokens = list(dict.fromkeys(tokens))
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=f"last kept token of {'; of '.join(tokens)}",
        columns=len(panels),
        panels=panels,
        tables=tables,
        group="layer",
        group_domain=domain,
        absent={each.label: each.trajectory for each in findings if isinstance(each.trajectory, str)},
    )


def _path_table(path: xr.Dataset) -> tuple[pd.DataFrame, list[alt.Axis]]:
    """Points of a path and the axes of its plane; a path of one component lies on a line."""
    position, explained = path["position"].values, path["explained"].values
    columns = {name: path[name].values for name in ("depth", "layer", "recurrence")}
    flat = np.zeros(len(position))
    columns |= {"first": position[:, 0], "second": position[:, 1] if position.shape[1] > 1 else flat}
    titles = [f"component {k + 1} ({share:.0%} of variance)" for k, share in enumerate([*explained, 0.0][:2])]
    return pd.DataFrame(columns), [
        alt.Axis(title=t, grid=True, tickCount=6, labelExpr=SHORT_LABEL) for t in titles
    ]


def _path_layers(axes: Sequence[alt.Axis], last: int, domain: tuple[int, int]) -> list[alt.Chart]:
    scale = alt.Scale(zero=False, nice=True, padding=12)
    base = alt.Chart().encode(
        x=alt.X("first:Q", axis=axes[0], scale=scale), y=alt.Y("second:Q", axis=axes[1], scale=scale)
    )
    tooltip = [alt.Tooltip(f"{name}:Q", format="d") for name in ("layer", "recurrence", "depth")]
    line = base.mark_line(strokeWidth=0.8, color=DEPTH_COLOR, opacity=0.35).encode(order="depth:Q")
    rising = alt.Scale(domain=[0, max(1, last)], range=[0.35, 0.95])
    by_recurrence = alt.Opacity("recurrence:Q", scale=rising, legend=None)
    points = base.mark_point(filled=True, size=26).encode(
        color=color_by("layer", domain),
        opacity=alt.condition(is_shown(*EVERYWHERE), by_recurrence, alt.value(0.35 * FADED)),
        tooltip=tooltip,
    )
    ends = (
        base.transform_filter(f"datum.recurrence == {last}")
        .mark_point(filled=False, size=90, strokeWidth=1.6, opacity=1)
        .encode(
            stroke=alt.Stroke("layer:Q", scale=color_scale("layer", domain), legend=None),
            opacity=fading(1.0, *EVERYWHERE),
            tooltip=tooltip,
        )
    )
    return [line, points, ends]
