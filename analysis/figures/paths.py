"""The figures of paths: residuals of tokens through the core, joined in the order the blocks run."""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..findings import Findings
from .answer_figures import drawn_of
from .axes import SHORT_LABEL
from .choices import ALL, EVERYWHERE, FADED, fading, is_shown
from .marks import DEPTH_COLOR, Figure, Panel, color_by, color_scale
from .panels import group_domain
from .words import number

MOST_POINTS = 1500  # points of one capture: more would cover one another on a screen
_POINT, _SMALL_POINT = 26, 14  # square pixels
_CLOSED = 0.01  # a path whose last two laps differ by less than 1 % of the lap's width has closed to the eye


def trajectory(findings: Sequence[Findings]) -> Figure | None:
    """Path of one token's residual through the core, on its first two principal components (figure 5)."""
    found = [(each, each.answers["trajectory"]) for each in findings]
    drawn = [(each, path) for each, path in found if not isinstance(path, str)]
    if not drawn:
        return None
    domain = group_domain([each for each, _ in drawn], "layer")
    panels, tables, tokens = [], {}, []
    for each, path in drawn:
        table = _path_table(path)
        data = f"path {each.label}"
        tables[data] = table
        columns, last = tuple(table.columns), int(path["recurrence"].max())
        panels.append(
            Panel(
                label=each.label,
                data=data,
                columns=columns,
                layers=_path_layers(_plane_axes(path), last, domain, _POINT),
                chosen=dict.fromkeys(EVERYWHERE, ALL),
            )
        )
        tokens.append(f"sequence {path.attrs['sequence_id']} (position {path.attrs['token_position']})")
    tokens = list(dict.fromkeys(tokens))
    return Figure(
        name="trajectory",
        title="One token's path through the loop",
        paper="figure 5",
        subtitle=f"last kept token of {'; of '.join(tokens)}",
        columns=len(panels),
        panels=panels,
        tables=tables,
        group="layer",
        group_domain=domain,
        absent={each.label: path for each, path in found if isinstance(path, str)},
        caption=[
            "The residual of one token after every core block, in the order the blocks run, on the first two "
            "principal components of all these points; rings mark the last recurrence, and each capture has "
            "axes of its own.",
            *(_path_seen(each.label, path) for each, path in drawn),
        ],
    )


def _path_seen(label: str, path: xr.Dataset) -> str:
    share = float(path["explained"].values[:2].sum())
    text = f"In {label} the plane holds {share:.0%} of the variance"
    recurrence, position = path["recurrence"].values, path["position"].values[:, :2]
    laps = [position[recurrence == index] for index in range(int(recurrence.max()) + 1)]
    if len(laps) < 2 or len(laps[-1]) != len(laps[-2]) or len(laps[-1]) < 2:
        return text + "."
    width = np.linalg.norm(laps[-1][:, None] - laps[-1][None], axis=-1).max()
    moved = np.linalg.norm(laps[-1] - laps[-2], axis=-1).max()
    if width == 0:
        return f"{text}; all layers end on one point."
    ending = "the path has closed into a cycle" if moved < _CLOSED * width else "the path has not closed"
    return f"{text}; {ending}: the last lap moves by {number(moved / width)} of its width."


def trajectories(findings: Sequence[Findings]) -> Figure | None:
    """Several tokens' paths in the plane of all kept core states (figure 5, for more than one token)."""
    drawn, absent = drawn_of(findings, "trajectories")
    if not drawn:
        return None
    domain = group_domain([each for each, _ in drawn], "layer")
    panels, tables, notes = [], {}, []
    for each, plane in drawn:
        label = each.label
        laps, num_laps = _laps(plane)
        tables[f"plane {label}"] = table = _plane_table(plane, laps)
        last = int(plane["recurrence"].max())
        if len(laps) < num_laps:
            notes.append(f"{label}: {len(laps)} of {num_laps} recurrences are drawn, the fewer the later.")
        layers = _path_layers(_plane_axes(plane), last, domain, _SMALL_POINT)
        columns = tuple(table.columns)
        panels.append(
            Panel(
                label=label,
                data=f"plane {label}",
                columns=columns,
                layers=layers,
                chosen=dict.fromkeys(EVERYWHERE, ALL),
            )
        )
    counts = dict.fromkeys(
        f"{plane.sizes['path']} sequences in the plane of {plane.attrs['num_states']:,} states"
        + (f", of one in {plane.attrs['every']} kept tokens" if plane.attrs["every"] > 1 else "")
        for _, plane in drawn
    )
    caption = "The last kept token of each of several sequences after every core block, joined in the order "
    caption += "the blocks run, on the first two principal components of the kept core states of the "
    caption += "capture; rings mark the last recurrence, and each capture has axes of its own."
    return Figure(
        name="trajectories",
        title="Several tokens' paths in one plane",
        paper="figure 5, for several tokens",
        subtitle="; ".join(counts),
        columns=len(panels),
        panels=panels,
        tables=tables,
        group="layer",
        group_domain=domain,
        absent=absent,
        notes=notes,
        caption=[caption, *(_plane_seen(each.label, plane) for each, plane in drawn)],
    )


def _laps(plane: xr.Dataset) -> tuple[np.ndarray, int]:
    """The recurrences to draw, all or as many as a screen can show, and how many there are."""
    every = np.unique(plane["recurrence"].values)
    most = max(2, MOST_POINTS * len(every) // (plane.sizes["path"] * plane.sizes["point"]))
    if len(every) <= most:
        return every, len(every)
    # paths go a long way early, and later laps lie on one another
    places = np.unique(np.geomspace(1, len(every), most).round().astype(int)) - 1
    return every[places], len(every)


def _plane_table(plane: xr.Dataset, laps: np.ndarray) -> pd.DataFrame:
    """Points of all paths at some recurrences; states that are not finite have none."""
    shown = plane.isel(point=np.isin(plane["recurrence"].values, laps))
    paths = [
        _path_table(shown.isel(path=path), sequence)
        for path, sequence in enumerate(plane["sequence_id"].values.tolist())
    ]
    return pd.concat(paths, ignore_index=True).dropna(ignore_index=True)


def _plane_seen(label: str, plane: xr.Dataset) -> str:
    text = f"In {label} the plane holds {float(plane['explained'].values[:2].sum()):.0%} of the variance"
    at_end = plane.isel(point=plane["recurrence"].values == plane["recurrence"].values.max())
    point_SLK = at_end["position"].values[:, :, :2]
    point_SLK = point_SLK[np.isfinite(point_SLK).all(axis=(1, 2))]
    if min(point_SLK.shape[:2]) < 2:
        return f"{text}."
    centre_LK = point_SLK.mean(axis=0)
    apart = np.sqrt(np.square(centre_LK - centre_LK.mean(axis=0)).sum(axis=1).mean())
    within = np.sqrt(np.square(point_SLK - centre_LK).sum(axis=2).mean())
    if not apart > 0:
        return f"{text}; all layers end on one point."
    return (
        f"{text}; after the last recurrence the sequences' points of a layer lie {number(within / apart)} "
        "times as far from their mean as the layers' means lie from the mean of all."
    )


def _path_table(path: xr.Dataset, sequence: int | None = None) -> pd.DataFrame:
    """Points of a path, which is the sequence's that its attribute names or the one given; a path of one
    component lies on a line.
    """
    position = path["position"].values
    columns = {name: path[name].values for name in ("depth", "layer", "recurrence")}
    flat = np.zeros(len(position))
    columns |= {"first": position[:, 0], "second": position[:, 1] if position.shape[1] > 1 else flat}
    return pd.DataFrame(columns).assign(sequence=path.attrs["sequence_id"] if sequence is None else sequence)


def _plane_axes(path: xr.Dataset) -> list[alt.Axis]:
    explained = path["explained"].values
    titles = [f"component {k + 1} ({share:.0%} of variance)" for k, share in enumerate([*explained, 0.0][:2])]
    return [alt.Axis(title=t, grid=True, tickCount=6, labelExpr=SHORT_LABEL) for t in titles]


def _path_layers(
    axes: Sequence[alt.Axis], last: int, domain: tuple[int, int], size: float
) -> list[alt.Chart]:
    """Lines, one a sequence; points by layer, fainter the earlier; rings at the last recurrence."""
    scale = alt.Scale(zero=False, nice=True, padding=12)
    base = alt.Chart().encode(
        x=alt.X("first:Q", axis=axes[0], scale=scale), y=alt.Y("second:Q", axis=axes[1], scale=scale)
    )
    tooltip = [alt.Tooltip(f"{name}:Q", format="d") for name in ("layer", "recurrence", "depth", "sequence")]
    line = base.mark_line(strokeWidth=0.8, color=DEPTH_COLOR, opacity=0.35)
    line = line.encode(order="depth:Q", detail="sequence:N")
    rising = alt.Scale(domain=[0, max(1, last)], range=[0.35, 0.95])
    by_recurrence = alt.Opacity("recurrence:Q", scale=rising, legend=None)
    points = base.mark_point(filled=True, size=size).encode(
        color=color_by("layer", domain),
        opacity=alt.condition(is_shown(*EVERYWHERE), by_recurrence, alt.value(0.35 * FADED)),
        tooltip=tooltip,
    )
    ends = (
        base.transform_filter(f"datum.recurrence == {last}")
        .mark_point(filled=False, size=3.5 * size, strokeWidth=1.6, opacity=1)
        .encode(
            stroke=alt.Stroke("layer:Q", scale=color_scale("layer", domain), legend=None),
            opacity=fading(1.0, *EVERYWHERE),
            tooltip=tooltip,
        )
    )
    return [line, points, ends]
