"""The figure of single heads: a map of a measure, by depth or by what a reader has chosen.

All together a map has a column for every block invocation. With a layer chosen its columns are that layer's
recurrences, with a recurrence chosen the layers that run in it, so that any store can be read cell by cell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..answers.heads import HEAD_MEASURES, gathered
from ..findings import Findings
from ..measures import MEASURES, SINK_SCORE
from ..thresholds import SETTLED_ENTROPY
from .answer_figures import drawn_by
from .axes import SHORT_LABEL, log_ticks, note_in_place
from .choices import ALL, EVERYWHERE, Choice, chosen, fading, is_shown, numbered
from .marks import Figure, Panel, chosen_place
from .panels import means_over
from .words import number

_LEAST = 1e-8  # share of the largest value; what is below it is rounding
_CHOSEN: dict[str, int] = dict.fromkeys((*EVERYWHERE, "head"), ALL)
_WIDE = 400  # number of depths from which on a cell of two maps side by side is thinner than a pixel
_LABEL = SHORT_LABEL.replace(".6~g", ".3~g")  # a legend's ends are no round numbers


def attention_heads(findings: Sequence[Findings]) -> Figure | None:
    """Heads that settle and heads that are sinks: a measure of every head at every depth (with figure 2)."""
    drawn, absent = drawn_by(findings, lambda each: gathered(each.answers))
    if not drawn:
        return None
    names = [name for name in HEAD_MEASURES if any(name in found for _, found in drawn)]
    names.sort(key=lambda name: sum(name not in found for _, found in drawn))  # what all have comes first
    domains = {name: _domain(name, [found for _, found in drawn if name in found]) for name in names}
    panels = []
    for each, found in drawn:
        first, *others = [p for name in names for p in _panels(each, found, name, domains[name])]
        panels.append(replace(first, instead=others))
    measure = Choice(name="measure", label="Measure", options={name: MEASURES[name].title for name in names})
    most_heads = max(found.sizes["head"] for _, found in drawn)
    return Figure(
        name="attention_heads",
        title="Every attention head",
        paper="the claim of figure 2, by head",
        subtitle=means_over([each for each, _ in drawn], banded=False),
        columns=len(panels),
        panels=panels,
        tables={_table_name(each): _table(found) for each, found in drawn},
        choices=[measure, *([numbered("head", most_heads)] if most_heads > 1 else [])],
        absent=absent,
        notes=[
            f"{each.label}: {len(each.depths):,} depths are more than the map has pixels; choose a layer or "
            "a recurrence to see single cells."
            for each, _ in drawn
            if len(each.depths) > _WIDE
        ],
        caption=[
            "A row for every head, a column for every block invocation in the order they run; with a layer "
            "chosen its recurrences, with a recurrence chosen its layers. Empty where a measure is 0 on a "
            "logarithmic scale, or not defined. A head is a row of its layer alone: heads of one number in "
            "different layers share no weights.",
            *filter(None, (_seen(each, found) for each, found in drawn)),
        ],
    )


def _table_name(each: Findings) -> str:
    return f"heads {each.label}"


def _table(found: xr.Dataset) -> pd.DataFrame:
    """A row per depth and head, a column per measure."""
    return found.sel(statistic="value", drop=True).to_dataframe().reset_index()


def _domain(name: str, every: Sequence[xr.Dataset]) -> tuple[float, float]:
    """Returns least and largest value of all captures; on a logarithmic scale those above rounding."""
    values = np.concatenate([found[name].sel(statistic="value").values.ravel() for found in every])
    values = values[np.isfinite(values)]
    is_log = MEASURES[name].log
    if is_log:
        values = values[values > _LEAST * values.max(initial=0)]
    if not len(values):
        return (1e-3, 1.0) if is_log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5 * abs(low), high + 0.5 * abs(high) + 1e-9)


def _panels(each: Findings, found: xr.Dataset, name: str, domain: tuple[float, float]) -> Iterator[Panel]:
    """A measure's maps: by depth, by recurrence of the chosen layer, by layer in the chosen recurrence."""
    table, (R, L) = _table_name(each), each.depths.core_RL.shape
    if name not in found:
        note = note_in_place(f"{MEASURES[name].title}: {_short(found.attrs['missing'][name])}")
        yield Panel(label=each.label, data=table, columns=("depth",), layers=[note], when={"measure": name})
        return
    in_loop = "datum.recurrence >= 0"
    by_depth = ("depth", len(each.depths), "depth (block invocations)", "true")
    views: dict[tuple[str, str], tuple[str, int, str, str]] = {("all", "all") if R else ("", ""): by_depth}
    if R:
        one = f"{in_loop} && datum.layer == {chosen('layer')}"
        views["one", ""] = ("recurrence", R, "recurrence of the chosen layer", one)
        one = f"{in_loop} && datum.recurrence == {chosen('recurrence')}"
        views["all", "one"] = ("layer", L, "layer of the core, at the chosen recurrence", one)
    for (layer, recurrence), (x, size, title, where) in views.items():
        when = {"measure": name, "layer": layer, "recurrence": recurrence}
        axis = alt.X(
            "from:Q",
            scale=alt.Scale(domain=[-0.5, size - 0.5], nice=False),
            axis=alt.Axis(title=title, format="d", tickMinStep=1, grid=False),
        )
        layers = [_cells(name, x, axis, found.sizes["head"], domain, where)]
        if x != "depth":
            layers += chosen_place(x, axis)
        yield Panel(
            label=each.label,
            data=table,
            columns=("depth", "layer", "recurrence", "head", name),
            layers=layers,
            chosen=_CHOSEN,
            when={key: wanted for key, wanted in when.items() if wanted},
        )


def _short(why: str) -> str:
    return "not captured" if why.startswith("needs") else why


def _cells(
    name: str, x: str, axis: alt.X, num_heads: int, domain: tuple[float, float], where: str
) -> alt.Chart:
    """A rectangle for every head and column, in the colours of maps."""
    about = MEASURES[name]
    is_log = about.log
    shades = alt.Scale(scheme="viridis", domain=list(domain), clamp=True, type="log" if is_log else "linear")
    ticks: dict[str, Any] = {"values": log_ticks(*domain)[-5:]} if is_log else {"tickCount": 4}
    legend = alt.Legend(title=f"{about.title} ({about.unit})", labelExpr=_LABEL, **ticks)
    y = alt.Y(
        "head_from:Q",
        scale=alt.Scale(domain=[-0.5, num_heads - 0.5], nice=False, reverse=True),
        axis=alt.Axis(title="head", format="d", tickMinStep=1, grid=False),
    )
    tooltip = [alt.Tooltip(f"{name}:Q", title=about.title.lower(), format=".4~g")]
    tooltip += [alt.Tooltip(f"{key}:Q", format="d") for key in ("head", "layer", "recurrence", "depth")]
    ends = {"from": f"datum.{x} - 0.5", "to": f"datum.{x} + 0.5"}
    ends |= {"head_from": "datum.head - 0.5", "head_to": "datum.head + 0.5"}
    shown = f"{where} && isValid(datum.{name})" + (f" && datum.{name} > 0" if is_log else "")
    marks = alt.Chart().transform_filter(shown).transform_calculate(**ends).mark_rect(clip=True)
    color = alt.Color(f"{name}:Q", scale=shades, legend=legend)
    edge = alt.Stroke(f"{name}:Q", scale=shades, legend=legend)  # or the page shows between neighbours
    width = alt.condition(is_shown("head"), alt.value(0.5), alt.value(0))  # faded edges would add up
    return marks.encode(
        x=axis,
        x2="to:Q",
        y=y,
        y2="head_to:Q",
        color=color,
        stroke=edge,
        strokeWidth=width,
        opacity=fading(1.0, "head"),
        tooltip=tooltip,
    )


def _seen(each: Findings, found: xr.Dataset) -> str:
    """Sinks, and heads that have not settled, after the last recurrence; without a loop sinks anywhere."""
    core_RL = each.depths.core_RL
    depth_L = core_RL[-1] if len(core_RL) else np.arange(len(each.depths))
    when = " at the last recurrence" if len(core_RL) else ""
    parts = []
    if (sink_LH := _values(found, "sink_score", depth_L)) is not None:
        count, at = int((sink_LH >= SINK_SCORE).sum()), _place(each, depth_L, sink_LH)
        parts.append(
            f"{count:,} of {sink_LH.size:,} heads are sinks{when} (sink score of {SINK_SCORE} or more); the "
            f"strongest is {at} with {number(float(np.nanmax(sink_LH)))}"
        )
    if (change_LH := _values(found, "entropy_change", depth_L)) is not None:
        count, at = int((change_LH <= SETTLED_ENTROPY).sum()), _place(each, depth_L, change_LH)
        parts.append(
            f"{count:,} of {change_LH.size:,} change their row entropy by {SETTLED_ENTROPY:g} nat or less "
            f"there; {at} changes most, by {number(float(np.nanmax(change_LH)))} nat"
        )
    return f"In {each.label} {'. '.join(parts)}." if parts else ""


def _values(found: xr.Dataset, name: str, depth_L: np.ndarray) -> np.ndarray | None:
    """A measure at these depths, [depth, head]; None where nothing of it is finite."""
    if name not in found:
        return None
    value_LH = found[name].sel(statistic="value").values[depth_L]
    return value_LH if np.isfinite(value_LH).any() else None


def _place(each: Findings, depth_L: np.ndarray, value_LH: np.ndarray) -> str:
    """Head and layer of the largest value."""
    row, head = np.unravel_index(int(np.nanargmax(value_LH)), value_LH.shape)
    return f"head {head} of layer {each.depths.layer[depth_L[row]]}"
