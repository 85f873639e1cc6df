"""Figures of answers that are no curves over depth: limits, rates, and when answers settle.

Each function takes the findings of one or several captures, as those of `catalogue.py` do. They
and the figures of stages are made by `answer_figure`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ...errors import CannotTellError
from ..answers.limits import LIMITS
from ..findings import Findings
from .axes import PANEL_HEIGHT, value_domain, y_axis
from .marks import DEPTH_COLOR, Figure, Panel

LIMIT_COLORS = ("#2b66a8", "#e39a2d", "#bf3f55", "#c9c8c2")
Drawn = list[tuple[Findings, xr.Dataset]]


def limits(findings: Sequence[Findings]) -> Figure | None:
    """How many tokens reach a fixed point, circle, slide on or do neither, by layer (figures 19 to 28)."""
    return answer_figure(
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
    """Factor by which each recurrence shortens the steps of each layer (beyond figures 3 and 4)."""
    return answer_figure(
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
    """Recurrence from which on tokens' likeliest next token stays what it is at the end (logit lens)."""
    return answer_figure(
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


def drawn_of(findings: Sequence[Findings], analysis: str) -> tuple[Drawn, dict[str, str]]:
    """Returns the captures that have the answer (or `stages`, or `reference`), and why others have not."""
    drawn, absent = [], {}
    for each in findings:
        gathered = {"stages": each.stages, "reference": each.reference}
        found = gathered.get(analysis, each.answers.get(analysis, "not asked"))
        if isinstance(found, xr.Dataset):
            drawn.append((each, found))
        else:
            absent[each.label] = found
    return drawn, absent


def drawn_by(
    findings: Sequence[Findings], answer: Callable[[Findings], xr.Dataset]
) -> tuple[Drawn, dict[str, str]]:
    """Returns the captures that `answer` has something for, and why it has nothing for others."""
    drawn, absent = [], {}
    for each in findings:
        try:
            drawn.append((each, answer(each)))
        except CannotTellError as error:
            absent[each.label] = str(error)
    return drawn, absent


def answer_figure(
    findings: Sequence[Findings],
    analysis: str,
    *,
    name: str,
    title: str,
    paper: str,
    table: Callable[[xr.Dataset], pd.DataFrame],
    layers: Callable[[pd.DataFrame, Sequence[pd.DataFrame]], list[alt.Chart]],
    caption: str,
    seen: Callable[[Findings, xr.Dataset], str],
    note: Callable[[xr.Dataset], str] = lambda found: "",
    height: int = PANEL_HEIGHT,
) -> Figure | None:
    """Makes a figure with a panel for each capture that has the answer.

    Args:
        analysis: name of the answer, as `drawn_of` takes it.
        table: gives what a panel draws from, of the answer.
        layers: gives a panel's marks, of its own table and those of all panels, which share axes.
        caption: what is drawn. seen: gives what a capture shows, "" for nothing.
        note: gives what else a reader must know of a capture, "" for nothing.
        height: height of a panel, pixels.
    """
    drawn, absent = drawn_of(findings, analysis)
    if not drawn:
        return None
    tables = {f"{name} {each.label}": table(found) for each, found in drawn}
    every = list(tables.values())
    panels = [
        Panel(
            label=each.label,
            data=key,
            columns=tuple(table.columns),
            layers=layers(table, every),
            height=height,
        )
        for (each, _), (key, table) in zip(drawn, tables.items(), strict=True)
    ]
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=counts_of(drawn),
        columns=len(panels),
        panels=panels,
        tables=tables,
        absent=absent,
        notes=[f"{each.label}: {text}" for each, found in drawn if (text := note(found))],
        caption=[caption, *filter(None, (seen(each, found) for each, found in drawn))],
    )


def counts_of(drawn: Drawn) -> str:
    sizes = [each.measures.attrs for each, _ in drawn]
    counts = dict.fromkeys(
        f"{size['num_sequences']:,} sequences, {size['num_tokens']:,} tokens" for size in sizes
    )
    return "over all finished sequences, with the 95 % band where there is one; " + "; ".join(counts)


def with_band(statistics: xr.DataArray, **more: xr.DataArray) -> pd.DataFrame:
    """Returns a row for each place on the axes: columns value, low, high, and those of more variables."""
    columns = {key: statistics.sel(statistic=key, drop=True) for key in ("value", "low", "high")}
    return xr.Dataset({**columns, **more}).to_dataframe().reset_index()


def _limits_table(found: xr.Dataset) -> pd.DataFrame:
    frame = with_band(found["share"])
    frame["order"] = [LIMITS.index(str(name)) for name in frame["limit"]]
    frame["limit"] = [str(name).replace("_", " ") for name in frame["limit"]]
    return frame


def _limits_layers(table: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    names = [name.replace("_", " ") for name in LIMITS]
    color = alt.Color(
        "limit:N", title=None, sort=names, scale=alt.Scale(domain=names, range=list(LIMIT_COLORS))
    )
    bars = alt.Chart().mark_bar(clip=True)
    tooltip = [alt.Tooltip("limit:N"), *numbers("layer", "value", "low", "high")]
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
    return with_band(found["rate"]).loc[:, ["layer", "value", "low", "high"]]


def _rates_layers(table: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    last = max(int(np.max(table["layer"])) for table in tables)
    x = alt.X(
        "layer:Q",
        scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
        axis=alt.Axis(title="layer", format="d", tickMinStep=1),
    )
    options = _y(tables, "rate (factor per recurrence)", [1.0])
    base = alt.Chart().transform_filter("isValid(datum.value)").encode(x=x)
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.4, color=DEPTH_COLOR)
    points = base.mark_point(filled=True, size=40, color=DEPTH_COLOR, opacity=1)
    return [
        bars.encode(y=alt.Y("low:Q", **options), y2="high:Q"),
        points.encode(y=alt.Y("value:Q", **options), tooltip=numbers("layer", "value", "low", "high")),
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
    # Vega-Lite draws nothing right from a field `count`
    return with_band(found["settled"], tokens=found["count"])


def _settling_layers(table: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    return curve(tables, "settled (share of tokens)", numbers("recurrence", "value", "low", "high"))


def _settling_seen(each: Findings, found: xr.Dataset) -> str:
    share_R, mean = (
        found["settled"].sel(statistic="value").values,
        float(found["mean_recurrence"].sel(statistic="value")),
    )
    return (
        f"In {each.label} {share_R[0]:.1%} of the tokens have their answer from the first recurrence on, "
        f"{share_R[-2]:.1%} by the one before the last; the mean is recurrence {mean:.3g}."
    )


def curve(
    tables: Sequence[pd.DataFrame],
    title: str,
    tooltip: list[alt.Tooltip],
    color: alt.Color | None = None,
) -> list[alt.Chart]:
    """Lines over recurrences with their bands."""
    last = max(int(np.max(table["recurrence"])) for table in tables)
    x = alt.X(
        "recurrence:Q",
        scale=alt.Scale(domain=[0, max(last, 1)], nice=False),
        axis=alt.Axis(title="recurrence", format="d", tickMinStep=1),
    )
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


def numbers(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".4~g") for name in names]
