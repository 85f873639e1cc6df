"""The depth study's two figures: stages at every recurrence count, and what is read at the end of each.

A line a count in the colours of recurrences, from the fewest to the most, dashed for the model's own count.
"""

import json
from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..depth_axis import stages_of
from ..figures.axes import value_domain, y_axis
from ..figures.marks import DEPTH_COLOR, RECURRENCE_COLORS, Figure, Panel, spread_colors
from ..figures.words import number
from ..measures import MEASURES
from .depth_study import ENDS, PLACE_MEASURES

_MOST_NAMES = 12  # names of places below a panel
_WIDEST_BAND = 3  # times what the lines run through, as for the report's figures


def stages_by_count(study: xr.Dataset, tables: dict[str, pd.DataFrame]) -> Figure:
    """Stages of attention and residual norm of every block, in its last invocation, a line a count (figures
    11, 12, 47 to 52: which of them shows which model is not in the text we have).
    """
    return Figure(
        name="stages_by_count",
        title="Stages at every recurrence count",
        paper="figures 11, 12 and 47 to 52",
        subtitle=_subtitle(study),
        columns=2,
        panels=[_place_panel(name, study, tables["places"]) for name in PLACE_MEASURES],
        tables={"places": tables["places"]},
        group="recurrence",
        group_domain=(int(study["count"][0]), int(study["count"][-1])),
        caption=_stages_seen(study),
        notes=_without_bands(study),
    )


def ends_by_count(study: xr.Dataset, tables: dict[str, pd.DataFrame]) -> Figure:
    """Numbers at the end of every count, against the model's own (with figures 11 and 12)."""
    panels = [_end_panel(name, study, tables["counts"]) for name in ENDS if _has(study, name)]
    return Figure(
        name="ends_by_count",
        title="The end of the loop at every recurrence count",
        paper="section 5.2",
        subtitle=_subtitle(study),
        columns=2,
        panels=panels,
        tables={"counts": tables["counts"]},
        caption=_ends_seen(study),
        notes=["Last step: a median over tokens, without a band."] if _has(study, "last_step") else [],
    )


def _without_bands(study: xr.Dataset) -> list[str]:
    names = [study[name].attrs["long_name"] for name in PLACE_MEASURES if not _band_is_drawn(study, name)]
    if not names:
        return []
    return [f"{', '.join(names)}: sequences differ in level by far more than the lines; no band is drawn."]


def _has(study: xr.Dataset, name: str) -> bool:
    return bool(np.isfinite(study[name].sel(statistic="value")).any())


def _subtitle(study: xr.Dataset) -> str:
    size = study.attrs
    return (
        f"mean over sequences, shaded: its 95 % band; {size['num_sequences']:,} sequences, "
        f"{size['num_tokens']:,} tokens; the model's own count is {size['own']}"
    )


def place_names(study: xr.Dataset) -> list[str]:
    stages = stages_of(study)
    return [
        f"{stages[stage]} {layer}"
        for stage, layer in zip(study["stage"].values, study["layer"].values, strict=True)
    ]


def _count_color(counts: Sequence[int]) -> alt.Color:
    """Green to night blue from the fewest recurrences to the most, as in every other figure."""
    colors = spread_colors(RECURRENCE_COLORS, len(counts))
    legend = alt.Legend(
        title="recurrences", symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2, orient="bottom"
    )
    return alt.Color("recurrences:O", scale=alt.Scale(domain=list(counts), range=colors), legend=legend)


def _band_is_drawn(study: xr.Dataset, name: str) -> bool:
    """Whether bands are drawn: not if they are so much wider than the lines that they grey the panel."""
    value, low, high = (study[name].sel(statistic=each).values for each in ("value", "low", "high"))
    finite = np.isfinite(high - low)
    run = float(np.nanmax(value) - np.nanmin(value)) if np.isfinite(value).any() else 0.0
    return bool(finite.any()) and float(np.median((high - low)[finite])) <= _WIDEST_BAND * run


def _place_panel(name: str, study: xr.Dataset, table: pd.DataFrame) -> Panel:
    log, about, counts = MEASURES[name].log, study[name].attrs, study["count"].values.tolist()
    banded = _band_is_drawn(study, name)
    value, low, high = (table[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    domain = value_domain([value], [low, high] if banded else [], log)
    y = alt.Y(f"{name}:Q", **y_axis(f"{about['long_name']} ({about['units']})", domain, log))
    base = alt.Chart().transform_filter(f"isValid(datum.{name})")
    base = base.encode(x=_place_axis(study), color=_count_color(counts), detail="recurrences:N")
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(y=y, strokeDash=_dash(study.attrs["own"]))
    layers = [line]
    if banded:
        shown = f"isValid(datum.{name}_low)" + (f" && datum.{name}_low > 0" if log else "")
        # the prelude is the same at every count, and its bands on one another would look like a narrower one
        shown += f" && (datum.stage != 'prelude' || datum.recurrences == {study.attrs['own']})"
        area = base.transform_filter(shown).mark_area(opacity=0.1, clip=True)
        options = y_axis(f"{about['long_name']} ({about['units']})", domain, log)
        layers = [area.encode(y=alt.Y(f"{name}_low:Q", **options), y2=f"{name}_high:Q"), line]
    tooltip = [alt.Tooltip(f"{name}:Q", title=about["long_name"].lower(), format=".4~g")]
    tooltip += [alt.Tooltip(f"{each}:Q", format="d") for each in ("recurrences", "layer")]
    points = base.mark_point(filled=True, size=40, opacity=0).encode(y=y, tooltip=tooltip)
    columns = ("recurrences", "place", "stage", "layer", name, f"{name}_low", f"{name}_high")
    return Panel(label=about["long_name"], data="places", columns=columns, layers=layers, hover=[points])


def _place_axis(study: xr.Dataset) -> alt.X:
    places = place_names(study)
    every = -(-len(places) // _MOST_NAMES)
    names = {str(index): text for index, text in enumerate(places) if index % every == 0}
    axis = alt.Axis(
        title="block, in its last invocation",
        values=[int(index) for index in names],
        labelExpr=f"{json.dumps(names)}[datum.value]",
        labelAngle=-40,
        labelOverlap=False,
    )
    ends = [-0.5, len(places) - 0.5]
    return alt.X("place:Q", axis=axis, scale=alt.Scale(domain=ends, nice=False))


def _dash(own: int) -> alt.StrokeDashValue | dict[str, object]:
    return {"condition": {"test": f"datum.recurrences == {own}", "value": [5, 3]}, "value": [1, 0]}


def _end_panel(name: str, study: xr.Dataset, table: pd.DataFrame) -> Panel:
    log, about, counts = ENDS[name].log, study[name].attrs, study["count"].values.tolist()
    value, low, high = (table[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    y = y_axis(f"{about['long_name']} ({about['units']})", value_domain([value], [low, high], log), log)
    scale = alt.Scale(type="log", base=2, domain=[counts[0], max(counts[-1], counts[0] + 1)], padding=10)
    x = alt.X("recurrences:Q", axis=alt.Axis(title="recurrences", values=counts, format="d"), scale=scale)
    base = alt.Chart().transform_filter(f"isValid(datum.{name})").encode(x=x)
    area = base.transform_filter(f"isValid(datum.{name}_low)").mark_area(opacity=0.14, clip=True)
    area = area.encode(y=alt.Y(f"{name}_low:Q", **y), y2=f"{name}_high:Q", color=alt.value(DEPTH_COLOR))
    line = base.encode(y=alt.Y(f"{name}:Q", **y), color=alt.value(DEPTH_COLOR))
    at_own = alt.Chart(
        alt.InlineData(values=[{"recurrences": study.attrs["own"], "text": "the model's own"}])
    )
    rule = at_own.mark_rule(strokeDash=[3, 3], color="#8c8b85").encode(x=x)
    word = at_own.mark_text(align="left", dx=4, dy=-6, fontSize=10, color="#77766f").encode(
        x=x, y=alt.value("height"), text="text:N"
    )
    tooltip = [alt.Tooltip(f"{name}:Q", title=about["long_name"].lower(), format=".4~g")]
    points = line.mark_point(filled=True, size=30, opacity=1)
    near = points.encode(tooltip=[*tooltip, alt.Tooltip("recurrences:Q", format="d")])
    columns = ("recurrences", name, f"{name}_low", f"{name}_high")
    layers = [rule, word, area, line.mark_line(strokeWidth=1.6, clip=True), points]
    return Panel(label=about["long_name"], data="counts", columns=columns, layers=layers, hover=[near])


def _stages_seen(study: xr.Dataset) -> list[str]:
    """Says what is drawn, and how far each measure of the most recurrences is from that of the own count."""
    drawn = (
        "Every block in its last invocation: the prelude, the core in the last recurrence, the coda; a line "
        "for each recurrence count (dashed: the model's own)."
    )
    counts, own = study["count"].values.tolist(), study.attrs["own"]
    if counts[-1] == own:
        return [drawn]
    parts = []
    for name in PLACE_MEASURES:
        value_CP = study[name].sel(statistic="value").values
        moved_P = np.abs(value_CP[-1] - value_CP[counts.index(own)])
        if np.isfinite(moved_P).any():
            place = int(np.nanargmax(moved_P))
            ends = f"{number(value_CP[counts.index(own), place])} to {number(value_CP[-1, place])}"
            parts.append(
                f"{study[name].attrs['long_name'].lower()} in {place_names(study)[place]} from {ends}"
            )
    return [drawn, f"From {own} to {counts[-1]} recurrences the largest changes are: {'; '.join(parts)}."]


def _ends_seen(study: xr.Dataset) -> list[str]:
    drawn = "What the loop ends in, by how often it ran; the table above says what each number is."
    counts, own = study["count"].values.tolist(), study.attrs["own"]
    said = []
    for count in (counts[0], counts[-1]):
        if count != own:
            here = study.sel(count=count, statistic="value")
            said.append(
                f"With {count} recurrences the output is at cosine {number(float(here['output_cosine']))} to "
                f"that of {own}; the loop state's answer is the same for {float(here['same_answer']):.0%} of "
                "tokens."
            )
    return [drawn, *said]
