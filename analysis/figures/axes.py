"""Scales and axes of figures, and the stages, thresholds and words behind and beside their lines."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from ..depth_axis import Depths
from ..findings import TIMES

STAGE_COLORS = {"prelude": "#e3ebf4", "core": "#f4f3ef", "coda": "#f3e6e1"}
PANEL_HEIGHT = 250
SHORT_LABEL = (  # zeros that would have to be counted become an exponent
    "abs(datum.value) < 0.001 && datum.value != 0 || abs(datum.value) > 99999"
    " ? format(datum.value, '~e') : format(datum.value, '.6~g')"
)


def y_axis(title: str, domain: tuple[float, float], log: bool) -> dict[str, Any]:
    """Scale and axis of a measured value, for `alt.Y`."""
    if log:
        scale = alt.Scale(type="log", domain=list(domain), nice=False, clamp=True)
        return {
            "scale": scale,
            "axis": alt.Axis(title=title, labelExpr=SHORT_LABEL, values=log_ticks(*domain)),
        }
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    return {"scale": scale, "axis": alt.Axis(title=title, tickCount=6, labelExpr=SHORT_LABEL)}


def log_ticks(low: float, high: float) -> list[float]:
    """Returns at most eight powers of ten, or 1, 2 and 5 of each if there are few."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    inside = [float(f"1e{power}") for power in range(first, last + 1) if low <= 10.0**power <= high]
    if len(inside) >= 3:
        return inside[:: -(-len(inside) // 8)]
    fine = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    return [tick for tick in fine if low <= tick <= high] or [low, high]


def value_domain(
    values: Sequence[np.ndarray], bands: Sequence[np.ndarray], log: bool, marks: Sequence[float] = ()
) -> tuple[float, float]:
    """The range that all captures of a figure share, bands and `marks` included."""
    within = np.concatenate([np.asarray(marks, float), *(each[np.isfinite(each)] for each in values)])
    within = within[within > 0] if log else within
    if not len(within):
        return (1e-3, 1.0) if log else (0.0, 1.0)
    if log:
        return float(within.min()) / 1.3, float(within.max()) * 1.3
    low, high = float(within.min()), float(within.max())
    least = 0.02 * max(abs(low), abs(high)) or 0.1  # or rounding would look like structure
    around = np.concatenate([within, *(each[np.isfinite(each)] for each in bands)])
    bottom, top = float(around.min()), float(around.max())
    room = max(0.04 * (top - bottom), (least - (top - bottom)) / 2)
    return bottom - room if low < 0 else max(bottom - room, 0.0), top + room


def depth_axis(num_depths: int) -> alt.X:
    return alt.X(
        "depth:Q",
        axis=alt.Axis(title="depth (block invocations)", tickMinStep=1, format="d"),
        scale=alt.Scale(domain=[-0.5, num_depths - 0.5], nice=False),
    )


def stage_shading(depths: Depths) -> list[alt.Chart]:
    """Prelude, core and coda behind a plot by depth; every other recurrence is shaded while they are few."""
    stage, recurrence = depths.stage, depths.recurrence
    edges = np.flatnonzero(np.diff(stage) != 0) + 1
    blocks = [
        {"from": start - 0.5, "to": stop - 0.5, "stage": depths.stages[stage[start]]}
        for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(stage)], strict=True)
    ]
    stripes = [
        {"from": b["from"], "to": b["to"], "stage": b["stage"]} for b in blocks if b["stage"] != "core"
    ]
    num_recurrences = int(recurrence.max(initial=-1)) + 1
    if 1 < num_recurrences <= 40:
        for index in range(0, num_recurrences, 2):
            depth = np.flatnonzero(recurrence == index)
            stripes.append({"from": float(depth[0]) - 0.5, "to": float(depth[-1]) + 0.5, "stage": "core"})
    for block in blocks:
        block["name"] = f"core {TIMES} {num_recurrences}" if block["stage"] == "core" else block["stage"]
    scale = alt.Scale(domain=[-0.5, len(stage) - 0.5], nice=False)
    x = alt.X("from:Q", scale=scale)
    rectangles = (
        alt.Chart(alt.InlineData(values=stripes))
        .mark_rect()
        .encode(x=x, x2="to:Q", y=alt.value(0), y2=alt.value("height"),
                color=alt.Color("stage:N", legend=None, scale=alt.Scale(
                    domain=list(STAGE_COLORS), range=list(STAGE_COLORS.values()))))
    )  # fmt: skip
    narrow_prelude = blocks[0]["stage"] == "prelude" and blocks[0]["to"] < 0.12 * len(stage)
    names = []
    for block in blocks:
        end = (
            block["stage"] == "coda"
        )  # the coda's name ends where it ends, the others begin where they begin
        line = 2 if block["stage"] == "core" and narrow_prelude else 1
        text = {"at": block["to" if end else "from"], "name": block["name"]}
        mark = alt.Chart(alt.InlineData(values=[text])).mark_text(
            align="right" if end else "left",
            dx=-4 if end else 4,
            dy=12 * line - 2,
            fontSize=10.5,
            color="#77766f",
        )
        names.append(mark.encode(x=alt.X("at:Q", scale=scale), y=alt.value(0), text="name:N"))
    return [rectangles, *names] if len(blocks) > 1 or num_recurrences else []


def threshold_line(value: float, text: str, y_options: dict[str, Any]) -> list[alt.Chart]:
    """Makes a dashed line at the threshold of a verdict."""
    data = alt.InlineData(values=[{"at": value, "text": text}])
    base = alt.Chart(data).encode(y=alt.Y("at:Q", **y_options))
    rule = base.mark_rule(strokeDash=[3, 3], color="#8c8b85", strokeWidth=1)
    label = base.mark_text(align="right", dy=-6, fontSize=10, color="#77766f").encode(
        x=alt.value("width"), text="text:N"
    )
    return [rule, label]


def note_in_place(text: str) -> alt.Chart:
    """Makes a panel of words in the place of a plot."""
    chart = alt.Chart(alt.InlineData(values=[{"text": text}]))
    x, y = alt.XValue(alt.ExprRef("width / 2")), alt.YValue(alt.ExprRef("height / 2"))
    return chart.mark_text(color="#8c8b85", fontSize=12).encode(x=x, y=y, text="text:N")
