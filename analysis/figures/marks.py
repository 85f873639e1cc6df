"""The hand that draws every figure: colours by grouping, lines with bands, stage shading, panels.

A figure is defined once: `Figure.chart` is what png and svg are made of, and its panels, as wide as the
page lets them be and with hover, are what the report shows. Captures share the axes of a figure, so that
eyes can compare.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from .axes import PANEL_HEIGHT, depth_axis
from .choices import ALL, Choice, chosen, fading, is_picked, is_shown, parameters

# one scheme per grouping, everywhere: recurrences from green to night blue, layers from amber to plum,
# realised depth in grey; lightness falls along each scheme, so that order shows without colour too
RECURRENCE_COLORS = ("#4fb58c", "#2c93a8", "#2b66a8", "#2a3a8c", "#1c1347")
LAYER_COLORS = ("#e39a2d", "#d96b3a", "#bf3f55", "#8a2a6b", "#4a1a55")
GROUP_COLORS = {"recurrence": RECURRENCE_COLORS, "layer": LAYER_COLORS}
DEPTH_COLOR = "#4a4a48"
CHOSEN_COLOR = "#bf3f55"  # for what a reader has chosen, if lines have no colour of their own
FONT = "Inter, Helvetica Neue, Arial, sans-serif"  # vl-convert brings its own for the last
FEW_LINES, _SOME_LINES = 16, 48  # up to here: bands beside the lines; from here on: hairlines


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of one capture. `columns` are the fields of the table `data` that it draws from."""

    label: str
    data: str
    columns: tuple[str, ...]
    layers: Sequence[alt.Chart]
    hover: Sequence[alt.Chart] = ()
    height: int = PANEL_HEIGHT
    """height in pixels; on a page with axes and legend"""
    chosen: Mapping[str, int] = field(default_factory=dict)
    """choices that its expressions name, with what they are at first"""
    when: Mapping[str, str] = field(default_factory=dict)
    """choices that it is drawn for: a value, or "one" or "all" """
    instead: Sequence["Panel"] = ()
    """panels that stand in its place for other choices"""

    def chart(self, hover: bool, alone: bool = True) -> alt.LayerChart | alt.FacetChart:
        """The plot; one that does not stand alone leaves the parameters of its choices to what holds it."""
        layers = [*self.layers, *self.hover] if hover else self.layers
        title = alt.Title(self.label, anchor="start", fontSize=12, fontWeight=600, color="#33332f", offset=8)
        options: dict[str, Any] = {"params": parameters(self.chosen)} if alone and self.chosen else {}
        data = alt.NamedData(name=self.data)
        return alt.layer(*layers, data=data, title=title, height=self.height, **options)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels in rows of `columns`, the tables they draw from, and what a reader must know to read them."""

    name: str
    title: str
    paper: str
    """figures of arXiv 2604.11791 that it answers to"""
    subtitle: str
    columns: int
    panels: Sequence[Panel]
    tables: dict[str, pd.DataFrame]
    caption: Sequence[str]
    """sentences: what is drawn, then what each capture that is drawn shows"""
    group: str | None = None
    group_domain: tuple[int, int] = (0, 1)
    choices: Sequence[Choice] = ()
    """controls of this figure alone"""
    absent: dict[str, str] = field(default_factory=dict)
    """capture -> why it is not drawn"""
    notes: Sequence[str] = ()
    """further facts that a reader must know, such as a band that is not drawn"""

    def chart(self, width: int = 420) -> alt.ConcatChart:
        """The whole figure as one chart that holds its data; nothing in it is loaded from elsewhere."""
        charts = [panel.chart(hover=False, alone=False).properties(width=width) for panel in self.panels]
        title = alt.Title(self.title, subtitle=self.subtitle, anchor="start", fontSize=16, offset=14)
        defaults = {name: value for panel in self.panels for name, value in panel.chosen.items()}
        options: dict[str, Any] = {"params": parameters(defaults)} if defaults else {}
        chart = alt.concat(*charts, columns=self.columns, title=title, spacing=28, **options)
        columns = {
            name: [c for p in self.panels if p.data == name for c in p.columns] for name in self.tables
        }
        datasets = {name: to_records(self.tables[name], dict.fromkeys(columns[name])) for name in self.tables}
        return chart.resolve_scale(color="shared").properties(datasets=datasets, config=config())


def config() -> dict[str, Any]:
    """Typography and axes that all figures share."""
    text = {"labelFont": FONT, "titleFont": FONT, "labelFontSize": 11, "titleFontSize": 11.5}
    text |= {"titleFontWeight": 500, "labelColor": "#55554f", "titleColor": "#33332f"}
    axis = text | {
        "gridColor": "#ebeae5",
        "domainColor": "#9a9993",
        "tickColor": "#9a9993",
        "titlePadding": 8,
    }
    titles = {"font": FONT, "subtitleFont": FONT, "subtitleColor": "#55554f", "subtitleFontSize": 12}
    return {
        "font": FONT,
        "background": "#ffffff",
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False, "minExtent": 48},  # plots below one another line up
        "legend": text
        | {"gradientLength": 160, "gradientThickness": 8, "gradientOpacity": 1, "orient": "bottom"},
        "title": titles,
        "concat": {"spacing": 28},
    }


def to_records(table: pd.DataFrame, names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows as JSON values: seven significant digits, as float32 has; None where there is no number."""
    columns = {name: to_json_column(np.asarray(table[name])) for name in names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def to_json_column(values: np.ndarray) -> list[Any]:
    if values.dtype.kind != "f":
        return values.tolist()
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values.tolist()]


def color_by(group: str, domain: tuple[int, int]) -> alt.Color:
    """Colour of a layer or recurrence, the same in every figure of a report."""
    legend = alt.Legend(title=group, type="gradient", format="d", tickMinStep=1)
    legend = legend if domain[1] > domain[0] else None
    return alt.Color(f"{group}:Q", scale=color_scale(group, domain), legend=legend)


def color_scale(group: str, domain: tuple[int, int]) -> alt.Scale:
    colors = GROUP_COLORS[group]
    stops = np.linspace(domain[0], max(domain[1], domain[0] + 1), len(colors))
    return alt.Scale(domain=stops.tolist(), range=list(colors), clamp=True)  # beyond it is not white


def spread_colors(scheme: Sequence[str], number: int) -> list[str]:
    """So many colours from one end of a scheme to the other."""
    at = np.linspace(0, len(scheme) - 1, number)
    channels = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in scheme])
    mixed = np.stack([np.interp(at, range(len(channels)), channel) for channel in channels.T], axis=1)
    return ["#" + "".join(f"{round(value):02x}" for value in color) for color in mixed]


def grouped_lines(
    *,
    x: str,
    x_domain: tuple[int, int],
    y: str,
    y_options: dict[str, Any],
    group: str,
    domain: tuple[int, int],
    log: bool,
    band: bool,
    tooltip: Sequence[alt.Tooltip],
    where: str = "datum.recurrence >= 0",
) -> tuple[list[alt.Chart], list[alt.Chart]]:
    """A line per layer or recurrence, thinner the more there are; and what hovering shows.

    The panel must hold the choices `group` and `x`: the line that is chosen stands out, a rule marks the
    chosen place.
    """
    width, opacity = _line_style(domain)
    shown = f"{where} && isValid(datum.{y})" + (f" && datum.{y} > 0" if log else "")
    single = x_domain[0] == x_domain[1]
    ends = [x_domain[0] - 0.5, x_domain[1] + 0.5] if single else list(x_domain)
    place = alt.X(
        f"{x}:Q", axis=alt.Axis(title=x, tickMinStep=1, format="d"), scale=alt.Scale(domain=ends, nice=False)
    )
    color = color_by(group, domain)
    alone = domain[0] == domain[1]  # what has no layers has none to choose
    base = alt.Chart().transform_filter(shown)
    base = base.encode(x=place, y=alt.Y(f"{y}:Q", **y_options), color=color, detail=f"{group}:N")
    line = base.mark_line(strokeWidth=width, opacity=opacity, clip=True, interpolate="linear")
    if not alone:
        stands_out = alt.condition(is_picked(group), alt.value(width + 1), alt.value(width))
        line = line.encode(opacity=fading(opacity, group), strokeWidth=stands_out)
    layers = [line]
    if band:
        area = (
            alt.Chart()
            .transform_filter(f"{shown} && isValid(datum.{y}_low)")
            .mark_area(opacity=0.13, clip=True)
            .encode(
                x=place,
                y=alt.Y(f"{y}_low:Q", **y_options),
                y2=f"{y}_high:Q",
                detail=f"{group}:N",
                fill=alt.Fill(f"{group}:Q", scale=color_scale(group, domain), legend=None),
            )
        )
        layers = [area if alone else area.encode(opacity=fading(0.13, group)), line]
    if single:  # a line needs two points
        layers.append(base.mark_point(filled=True, size=18, opacity=1))
    near = alt.selection_point(
        on="pointerover", clear="pointerout", nearest=True, fields=[group], empty=False
    )
    focus = base.transform_filter(near).mark_line(strokeWidth=width + 1.6, clip=True)
    points = base.mark_point(filled=True, size=34).encode(
        opacity=alt.condition(near, alt.value(1), alt.value(0)), tooltip=list(tooltip)
    )
    if not alone:  # hovering finds what is chosen
        points = points.transform_filter(is_shown(group))
    return [*chosen_place(x, place), *layers], [focus, points.add_params(near)]


def _line_style(domain: tuple[int, int]) -> tuple[float, float]:
    """Width and opacity of a line among so many."""
    num_lines = domain[1] - domain[0] + 1
    if num_lines <= FEW_LINES:
        return 1.8, 0.95
    return (1.2, 0.8) if num_lines <= _SOME_LINES else (0.7, 0.6)


def chosen_place(x: str, place: alt.X) -> list[alt.Chart]:
    """A rule where the layer or recurrence that a reader has chosen stands on an axis of them."""
    base = alt.Chart(alt.InlineData(values=[{}])).transform_calculate(at=chosen(x))
    base = base.transform_filter(f"datum.at != {ALL}").mark_rule(color=CHOSEN_COLOR, opacity=0.6, clip=True)
    return [base.encode(x=alt.X("at:Q", axis=place["axis"], scale=place["scale"]))]


def depth_lines(
    *,
    y: str,
    y_options: dict[str, Any],
    num_depths: int,
    log: bool,
    band: bool,
    tooltip: Sequence[alt.Tooltip],
    dash: bool = False,
    where: str = "true",
) -> tuple[list[alt.Chart], list[alt.Chart]]:
    """One grey line along realised depth with its band; and what hovering shows.

    The panel must hold the choices layer and recurrence: the blocks of the core that are chosen stand out.
    """
    shown = f"{where} && isValid(datum.{y})" + (f" && datum.{y} > 0" if log else "")
    base = (
        alt.Chart()
        .transform_filter(shown)
        .encode(x=depth_axis(num_depths), y=alt.Y(f"{y}:Q", **y_options), color=alt.value(DEPTH_COLOR))
    )
    area = base.mark_area(opacity=0.14, clip=True).encode(
        y=alt.Y(f"{y}_low:Q", **y_options), y2=f"{y}_high:Q"
    )
    width = 1.6 if num_depths <= 100 else 1.0
    line = base.mark_line(strokeWidth=width, clip=True, strokeDash=[4, 3] if dash else [1, 0])
    layers = [area.transform_filter(f"isValid(datum.{y}_low)"), line] if band else [line]
    if num_depths <= 64:
        layers.append(base.mark_point(filled=True, size=16, opacity=1))
    picked = base.transform_filter(f"datum.recurrence >= 0 && {is_picked('layer', 'recurrence')}")
    layers.append(picked.mark_point(filled=True, size=42, opacity=1).encode(color=alt.value(CHOSEN_COLOR)))
    near = alt.selection_point(
        on="pointerover", clear="pointerout", nearest=True, fields=["depth"], empty=False
    )
    points = base.mark_point(filled=True, size=44).encode(
        opacity=alt.condition(near, alt.value(1), alt.value(0)), tooltip=list(tooltip)
    )
    return layers, [points.add_params(near)]
