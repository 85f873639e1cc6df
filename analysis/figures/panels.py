"""Makes figures of findings: their panels, shared axes and order, and notes on what cannot be drawn.

Two kinds: lines over layers or recurrences of the core, and lines along realised depth. A row of panels is a
measure, a column a capture; where one capture lacks what its row shows, its place stays and says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ..findings import Findings
from ..measures import MEASURES
from .axes import (
    note_in_place,
    stage_shading,
    threshold_line,
    value_domain,
    y_axis,
)
from .choices import ALL, EVERYWHERE
from .marks import FEW_LINES, Figure, Panel, depth_lines, grouped_lines
from .words import captioned

_WIDE = 100  # number of depths from which on a panel takes the whole width
_WIDEST_BAND = 3  # a band this many times as wide as what curves run through would only grey the panel


def grouped_figure(
    findings: Sequence[Findings],
    *,
    name: str,
    title: str,
    paper: str,
    x: str,
    group: str,
    measures: Sequence[str],
    thresholds: dict[str, tuple[float, str]] | None = None,
    at_loop_state: bool = False,
    caption: str,
    seen: Callable[[Findings], str],
) -> Figure | None:
    """Rows of measures, columns of captures; a line per layer or per recurrence of the core, or one alone for
    what is read from the loop state.
    """
    drawn = [each for each in findings if len(each.depths.core_RL) and _has(each, measures)]
    if not drawn:
        return None
    tables = {_table_name(each): each.by_depth for each in drawn}
    domain, x_domain = group_domain(drawn, group), group_domain(drawn, x)
    if at_loop_state:  # one line a capture, and so one colour for all
        domain = (domain[1], domain[1])
    if x == "recurrence":
        x_domain = (max(0, min(MEASURES[measured].first for measured in measures)), x_domain[1])
    panels, notes, banded = [], [], False
    for measured in (name for name in measures if any(name in each.measures for each in drawn)):
        threshold = (thresholds or {}).get(measured)
        marks = [threshold[0]] if threshold else []
        axis = _axis(tables, [measured], marks, core_only=True, band=domain[1] - domain[0] < FEW_LINES)
        notes += axis.notes
        banded |= axis.band
        row = _GroupedRow(measured, x, x_domain, group, domain, axis, threshold)
        panels += [row.panel(each, beside=len(drawn) > 1) for each in drawn]
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=means_over(drawn, banded),
        columns=len(drawn) if len(drawn) > 1 else len(panels),
        panels=panels,
        tables=tables,
        group=group,
        group_domain=domain,
        absent=_absent(findings, drawn, measures),
        notes=notes,
        caption=captioned(caption, seen, findings),
    )


@dataclass(frozen=True)
class _GroupedRow:
    """The part of a row that its captures share: the measure, its place and grouping, the y axis."""

    measured: str
    x: str
    x_domain: tuple[int, int]
    group: str
    domain: tuple[int, int]
    axis: "_Axis"
    threshold: tuple[float, str] | None

    def panel(self, each: Findings, beside: bool) -> Panel:
        if self.measured not in each.measures:
            return _empty_panel(each, self.measured)
        layers, hover = grouped_lines(
            x=self.x,
            x_domain=self.x_domain,
            y=self.measured,
            y_options=self.axis.options,
            group=self.group,
            domain=self.domain,
            log=self.axis.log,
            band=self.axis.band,
            tooltip=_tooltip(self.measured),
        )
        above = threshold_line(*self.threshold, self.axis.options) if self.threshold else []
        return _panel(each, beside, [self.measured], [*above, *layers], hover)


def depth_figure(
    findings: Sequence[Findings],
    *,
    name: str,
    title: str,
    paper: str,
    rows: Sequence[tuple[str, ...]],
    caption: str,
    seen: Callable[[Findings], str],
) -> Figure | None:
    """Rows of measures (dashed from the second on), columns of captures, along realised depth."""
    measures = [measured for row in rows for measured in row]
    drawn = [each for each in findings if _has(each, measures)]
    if not drawn:
        return None
    tables = {_table_name(each): each.by_depth for each in drawn}
    panels, notes, banded = [], [], False
    for row in (row for row in rows if any(_has(each, row) for each in drawn)):
        axis = _axis(tables, row, [], core_only=False, band=True)
        notes += axis.notes
        banded |= axis.band
        panels += [_depth_panel(each, row, axis, beside=len(drawn) > 1) for each in drawn]
    return Figure(
        name=name,
        title=title,
        paper=paper,
        subtitle=means_over(drawn, banded),
        columns=len(drawn) if len(drawn) > 1 or len(drawn[0].depths) > _WIDE else len(panels),
        panels=panels,
        tables=tables,
        absent=_absent(findings, drawn, measures),
        notes=notes,
        caption=captioned(caption, seen, findings),
    )


def _depth_panel(each: Findings, row: Sequence[str], axis: "_Axis", beside: bool) -> Panel:
    layers, hover = [], []
    for dash, measured in enumerate(row):
        if measured in each.measures:
            lines, near = depth_lines(
                y=measured,
                y_options=axis.options,
                num_depths=len(each.depths),
                log=axis.log,
                band=axis.band,
                tooltip=_tooltip(measured),
                dash=dash > 0,
            )
            layers, hover = layers + lines, hover + near
    if not layers:
        return _empty_panel(each, row[0])
    shading = stage_shading(each.depths)
    return _panel(each, beside, row, [*shading, *layers], hover)


@dataclass(frozen=True)
class _Axis:
    """The y axis that the captures of a row share, and whether bands are drawn on it."""

    log: bool
    band: bool
    options: dict[str, Any]
    notes: list[str]


def _axis(
    tables: dict[str, pd.DataFrame], names: Sequence[str], marks: Sequence[float], core_only: bool, band: bool
) -> _Axis:
    about, notes = MEASURES[names[0]], []
    log = about.log
    parts = [table.query("recurrence >= 0") if core_only else table for table in tables.values()]
    values = [_column(part, name) for part in parts for name in names if name in part]
    lows = [_column(part, f"{name}_low") for part in parts for name in names if name in part]
    highs = [_column(part, f"{name}_high") for part in parts for name in names if name in part]
    finite = [each[np.isfinite(each)] for each in values]
    if band and not log:
        widths = [high - low for low, high in zip(lows, highs, strict=True)]
        width = max(
            (float(np.median(w[np.isfinite(w)])) for w in widths if np.isfinite(w).any()), default=0.0
        )
        run = max((float(np.ptp(each)) for each in finite if len(each)), default=0.0)
        band = width > 0
        if width > _WIDEST_BAND * run:
            band = False
            notes = [
                f"{about.title}: the 95 % band of the mean is {width / 2:.2g} {about.unit} either way, "
                f"because sequences differ in level, while the curves run through {run:.2g}; it is not drawn."
            ]
    domain = value_domain(values, [*lows, *highs] if band else [], log, marks)
    return _Axis(log, band, y_axis(f"{about.title} ({about.unit})", domain, log), notes)


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    return np.asarray(table[name], dtype=float)


def _panel(
    each: Findings,
    beside: bool,
    measured: Sequence[str],
    layers: Sequence[alt.Chart],
    hover: Sequence[alt.Chart],
) -> Panel:
    """A panel under its capture's label, or the measure's title where there is one capture alone."""
    held = [name for name in measured if name in each.measures]
    values = [column for name in held for column in (name, f"{name}_low", f"{name}_high")]
    columns = ("depth", "stage", "layer", "recurrence", *values)
    label = each.label if beside else MEASURES[measured[0]].title
    return Panel(
        label=label,
        data=_table_name(each),
        columns=columns,
        layers=layers,
        hover=hover,
        chosen=dict.fromkeys(EVERYWHERE, ALL),
    )


def _empty_panel(each: Findings, measured: str) -> Panel:
    text = f"{MEASURES[measured].title}: not captured"
    return Panel(label=each.label, data=_table_name(each), columns=("depth",), layers=[note_in_place(text)])


def _tooltip(measured: str) -> list[alt.Tooltip]:
    titles = {"": MEASURES[measured].title.lower(), "_low": "low", "_high": "high"}
    value = [alt.Tooltip(f"{measured}{end}:Q", title=title, format=".4~g") for end, title in titles.items()]
    place = [alt.Tooltip(f"{name}:Q", format="d") for name in ("layer", "recurrence", "depth")]
    return [
        *value,
        *place,
    ]  # numbers only: Vega-Lite 6 shows words as undefined where the nearest point is sought


def _table_name(each: Findings) -> str:
    return f"capture {each.label}"


def _has(each: Findings, measures: Sequence[str]) -> bool:
    return any(measured in each.measures for measured in measures)


def group_domain(findings: Sequence[Findings], group: str) -> tuple[int, int]:
    """First and last layer or recurrence of the core over all captures."""
    shapes = [each.depths.core_RL.shape for each in findings]
    return 0, max(shape[0 if group == "recurrence" else 1] for shape in shapes) - 1


def means_over(findings: Sequence[Findings], banded: bool) -> str:
    """Says over how many sequences and tokens the captures of a figure are means."""
    sizes = [each.measures.attrs for each in findings]
    counts = dict.fromkeys((size["num_sequences"], size["num_tokens"]) for size in sizes)
    if len(counts) == 1 and sizes[0]["num_sequences"] == 1:
        return f"mean over the {sizes[0]['num_tokens']:,} tokens of one sequence"
    text = "; ".join(f"{sequences:,} sequences, {tokens:,} tokens" for sequences, tokens in counts)
    return f"mean over sequences{', shaded: its 95 % band' if banded else ''}; {text}"


def _absent(
    findings: Sequence[Findings], drawn: Sequence[Findings], measures: Sequence[str]
) -> dict[str, str]:
    """Says why a capture, or a measure of it, is not drawn."""
    labels, absent = {each.label for each in drawn}, {}
    for each in findings:
        missing = each.measures.attrs["missing"]
        lost: dict[str, list[str]] = {}
        for measured in measures:
            if measured in missing:
                lost.setdefault(missing[measured], []).append(MEASURES[measured].title)
        if each.label not in labels:
            absent[each.label] = "; ".join(lost) or "the model has no loop"
        elif lost:
            absent[each.label] = "; ".join(f"{', '.join(titles)} ({why})" for why, titles in lost.items())
    return absent
