"""Figures of what is no curve over depth: maps of block pairs, limits, rates, settling, stages that repeat.

Each function takes the findings of one or several captures, as those of `figures.py` do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from .axes import value_domain, y_axis
from .captions import number
from .findings import Findings
from .limits import LIMITS
from .marks import DEPTH_COLOR, Figure, Panel

MOST_BINS = 128  # cells a side of a map: a page holds as many as a screen can show
LIMIT_COLORS = ("#2b66a8", "#e39a2d", "#bf3f55", "#c9c8c2")
MEASURE_COLORS = ("#2b66a8", "#d96b3a", "#4fb58c", "#8a2a6b")
_Drawn = list[tuple[Findings, xr.Dataset]]


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


def limits(findings: Sequence[Findings]) -> Figure | None:
    """How many tokens reach a fixed point, circle, slide on or do neither, by layer (figures 19 to 28)."""
    return _figure(
        findings,
        "limits",
        name="limits",
        title="Where tokens end up",
        paper="figures 19 to 28",
        table=_limits_table,
        layers=_limits_layers,
        caption="Share of tokens by where their residual goes, for each layer of the core. A cosine sees "
        "directions alone: the steps tell whether the length settles too.",
        seen=_limits_seen,
    )


def rates(findings: Sequence[Findings]) -> Figure | None:
    """By which factor each recurrence shortens the steps of each layer (beyond figures 3 and 4)."""
    return _figure(
        findings,
        "rates",
        name="rates",
        title="Rate of convergence",
        paper="",
        table=_rates_table,
        layers=_rates_layers,
        caption="Factor by which a step shrinks from one recurrence to the next, fitted to each sequence "
        "before rounding; below 1 the layer converges.",
        seen=_rates_seen,
    )


def settling(findings: Sequence[Findings]) -> Figure | None:
    """From which recurrence on tokens' likeliest next token stays what it is at the end (logit lens)."""
    return _figure(
        findings,
        "settling",
        name="settling",
        title="When answers settle",
        paper="",
        table=_settling_table,
        layers=_settling_layers,
        caption="Share of tokens whose likeliest next token stays, from that recurrence on, what it is after "
        "the last. What changes at the last recurrence may not have settled.",
        seen=_settling_seen,
    )


def stages_repeat(findings: Sequence[Findings]) -> Figure | None:
    """Correlation of each recurrence's stages over layers with the last one's (figures 7, 8 and 32)."""
    return _figure(
        findings,
        "stages",
        name="stages_repeat",
        title="Recurrences that repeat their stages",
        paper="figures 7, 8 and 32, as a number",
        table=_stages_table,
        layers=_stages_layers,
        caption="Correlation, over the core's layers, of a recurrence's values with the last recurrence's of "
        "the same sequence: 1 where the same stages come in the same layers.",
        seen=_stages_seen,
    )


def _drawn(findings: Sequence[Findings], analysis: str) -> tuple[_Drawn, dict[str, str]]:
    """Captures that have the answer, and why others have not."""
    drawn, absent = [], {}
    for each in findings:
        found = each.stages if analysis == "stages" else each.answers.get(analysis, "not asked")
        if isinstance(found, xr.Dataset):
            drawn.append((each, found))
        else:
            absent[each.label] = found
    return drawn, absent


def _figure(
    findings: Sequence[Findings],
    analysis: str,
    *,
    name: str,
    title: str,
    paper: str,
    table: Callable[[xr.Dataset], pd.DataFrame],
    layers: Callable[[Sequence[pd.DataFrame]], list[alt.Chart]],
    caption: str,
    seen: Callable[[Findings, xr.Dataset], str],
) -> Figure | None:
    drawn, absent = _drawn(findings, analysis)
    if not drawn:
        return None
    tables = {f"{name} {each.label}": table(found) for each, found in drawn}
    marks = layers(list(tables.values()))
    panels = [
        Panel(label=each.label, data=key, columns=tuple(tables[key].columns), layers=marks)
        for (each, _), key in zip(drawn, tables, strict=True)
    ]
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=_counts(drawn),
        columns=len(panels),
        panels=panels,
        tables=tables,
        absent=absent,
        caption=[caption, *filter(None, (seen(each, found) for each, found in drawn))],
    )


def _counts(drawn: _Drawn) -> str:
    sizes = [each.measures.attrs for each, _ in drawn]
    counts = dict.fromkeys(
        f"{size['num_sequences']:,} sequences, {size['num_tokens']:,} tokens" for size in sizes
    )
    return "over all finished sequences, with the 95 % band where there is one; " + "; ".join(counts)


def _map_figure(findings: Sequence[Findings], name: str, title: str, paper: str) -> Figure | None:
    drawn, absent = _drawn(findings, name)
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
        )
        for each, _ in drawn
    ]
    caption = "Every block invocation against every other, in the order they run, from the top left. "
    caption += "Stripes that repeat are layers that are themselves again in every recurrence."
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=_counts(drawn),
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


def _limits_table(found: xr.Dataset) -> pd.DataFrame:
    share = found["share"]
    table = xr.Dataset({key: share.sel(statistic=key, drop=True) for key in ("value", "low", "high")})
    frame = table.to_dataframe().reset_index()
    frame["order"] = [LIMITS.index(str(name)) for name in frame["limit"]]
    frame["limit"] = [str(name).replace("_", " ") for name in frame["limit"]]
    return frame


def _limits_layers(tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    names = [name.replace("_", " ") for name in LIMITS]
    color = alt.Color(
        "limit:N", title=None, sort=names, scale=alt.Scale(domain=names, range=list(LIMIT_COLORS))
    )
    bars = alt.Chart().mark_bar(clip=True)
    tooltip = [alt.Tooltip("limit:N"), *_numbers("layer", "value", "low", "high")]
    return [
        bars.encode(
            x=alt.X("layer:O", axis=alt.Axis(title="layer", labelAngle=0, labelOverlap=True)),
            y=alt.Y("value:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share of tokens")),
            color=color,
            order="order:Q",
            tooltip=tooltip,
        )
    ]


def _limits_seen(each: Findings, found: xr.Dataset) -> str:
    share_C = found["share"].sel(statistic="value").isel(layer=-1)
    parts = [
        f"{float(share_C.sel(limit=name)):.1%} {text}"
        for name, text in (
            ("fixed_point", "of the tokens end at a fixed point"),
            ("orbit", "circle"),
            ("slider", "slide on"),
            ("unknown", "do none of these"),
        )
    ]
    return f"In {each.label}, at the core's last layer, {', '.join(parts)}."


def _rates_table(found: xr.Dataset) -> pd.DataFrame:
    rate = found["rate"]
    table = xr.Dataset({key: rate.sel(statistic=key, drop=True) for key in ("value", "low", "high")})
    return table.to_dataframe().reset_index().loc[:, ["layer", "value", "low", "high"]]


def _rates_layers(tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    last = max(int(np.max(table["layer"])) for table in tables)
    x = alt.X("layer:Q", scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
              axis=alt.Axis(title="layer", format="d", tickMinStep=1))  # fmt: skip
    options = _y(tables, "rate (factor per recurrence)", [1.0])
    base = alt.Chart().transform_filter("isValid(datum.value)").encode(x=x)
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.4, color=DEPTH_COLOR)
    points = base.mark_point(filled=True, size=40, color=DEPTH_COLOR, opacity=1)
    return [
        bars.encode(y=alt.Y("low:Q", **options), y2="high:Q"),
        points.encode(y=alt.Y("value:Q", **options), tooltip=_numbers("layer", "value", "low", "high")),
    ]


def _rates_seen(each: Findings, found: xr.Dataset) -> str:
    rate_L = found["rate"].sel(statistic="value").values
    if not np.isfinite(rate_L).any():
        return f"In {each.label} no layer has a rate: too few steps stand above rounding."
    layer = int(np.nanargmax(rate_L))
    half = float(found["half_life"].sel(statistic="value").values[layer])
    text = f"In {each.label} the slowest layer, {layer}, keeps {rate_L[layer]:.3f} of its step"
    return f"{text}: " + (
        f"it halves in {half:.3g} recurrences." if np.isfinite(half) else "it does not shrink."
    )


def _settling_table(found: xr.Dataset) -> pd.DataFrame:
    settled = found["settled"]
    columns = {key: settled.sel(statistic=key, drop=True) for key in ("value", "low", "high")}
    table = xr.Dataset({**columns, "count": found["count"]}).to_dataframe().reset_index()
    return table.rename(columns={"count": "tokens"})  # Vega-Lite draws nothing right from a field `count`


def _settling_layers(tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    return _curve(tables, "settled (share of tokens)", _numbers("recurrence", "value", "low", "high"))


def _settling_seen(each: Findings, found: xr.Dataset) -> str:
    share_R, mean = (
        found["settled"].sel(statistic="value").values,
        float(found["mean_recurrence"].sel(statistic="value")),
    )
    return (
        f"In {each.label} {share_R[0]:.1%} of the tokens have their answer from the first recurrence on, "
        f"{share_R[-2]:.1%} by the one before the last; the mean is recurrence {mean:.3g}."
    )


def _stages_table(found: xr.Dataset) -> pd.DataFrame:
    correlation = found["correlation"]
    table = xr.Dataset({key: correlation.sel(statistic=key, drop=True) for key in ("value", "low", "high")})
    frame = table.to_dataframe().reset_index()
    frame["measure"] = [str(name).replace("_", " ") for name in frame["measure"]]
    return frame.loc[:, ["measure", "recurrence", "value", "low", "high"]]


def _stages_layers(tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    names = list(dict.fromkeys(str(name) for table in tables for name in table["measure"]))
    scale = alt.Scale(domain=names, range=list(MEASURE_COLORS[: len(names)]))
    color = alt.Color("measure:N", scale=scale, legend=alt.Legend(title=None, symbolOpacity=1))
    return _curve(tables, "correlation", _numbers("recurrence", "value", "low", "high"), color)


def _stages_seen(each: Findings, found: xr.Dataset) -> str:
    value = found["correlation"].sel(statistic="value")
    parts = [
        f"{str(name).replace('_', ' ')} at {value.sel(measure=name).values[0]:.3f} in the first recurrence "
        f"and {value.sel(measure=name).values[-2]:.3f} in the one before the last"
        for name in value["measure"].values
        if np.isfinite(value.sel(measure=name).values[[0, -2]]).all()
    ]
    return f"In {each.label} correlations stand for {'; '.join(parts)}." if parts else ""


def _curve(
    tables: Sequence[pd.DataFrame],
    title: str,
    tooltip: list[alt.Tooltip],
    color: alt.Color | None = None,
) -> list[alt.Chart]:
    """Lines over recurrences with their bands."""
    last = max(int(np.max(table["recurrence"])) for table in tables)
    x = alt.X("recurrence:Q", scale=alt.Scale(domain=[0, max(last, 1)], nice=False),
              axis=alt.Axis(title="recurrence", format="d", tickMinStep=1))  # fmt: skip
    options = _y(tables, title, [])
    base = alt.Chart().transform_filter("isValid(datum.value)").encode(x=x)
    paint: dict[str, Any] = {"color": color if color is not None else alt.value(DEPTH_COLOR)}
    area = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.14, clip=True)
    return [
        area.encode(y=alt.Y("low:Q", **options), y2="high:Q", **paint),
        base.mark_line(strokeWidth=1.6, clip=True).encode(y=alt.Y("value:Q", **options), **paint),
        base.mark_point(filled=True, size=22, opacity=0.9).encode(
            y=alt.Y("value:Q", **options), tooltip=tooltip, **paint
        ),
    ]


def _y(tables: Sequence[pd.DataFrame], title: str, marks: list[float]) -> dict[str, Any]:
    values, lows, highs = (
        [np.asarray(table[key], float) for table in tables] for key in ("value", "low", "high")
    )
    return y_axis(title, value_domain(values, [*lows, *highs], False, marks), False)


def _numbers(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".4~g") for name in names]
