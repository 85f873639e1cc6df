"""The figure of prediction and suppression neurons: shares by block, from the weights alone."""

from collections.abc import Sequence
from itertools import pairwise

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..answers.neuron_shares import KINDS
from ..findings import Findings
from .answer_figures import drawn_of
from .axes import STAGE_COLORS
from .marks import Figure, Panel
from .words import number

KIND_COLORS = ("#2b66a8", "#d96b3a")


def neurons(findings: Sequence[Findings]) -> Figure | None:
    """Share of neurons that promote or suppress tokens, by block (figure 63 by our reading)."""
    drawn, absent = drawn_of(findings, "neurons")
    if not drawn:
        return None
    tables = {f"neurons {each.label}": _table(found) for each, found in drawn}
    most = max(float(found["share"].sum("kind").max()) for _, found in drawn)
    panels = [
        Panel(
            label=each.label,
            data=data,
            columns=tuple(tables[data].columns),
            layers=[*_shading(found), _bars(found, most)],
        )
        for (each, found), data in zip(drawn, tables, strict=True)
    ]
    thresholds = dict.fromkeys(f"{found.attrs['threshold']:g}" for _, found in drawn)
    caption = "Share of each block's MLP neurons whose effect on the logits, read through the final norm and "
    caption += "the head, has heavy tails over the vocabulary, by the sign of its skew: prediction neurons "
    caption += "raise few tokens, suppression neurons lower few. The weights alone tell, so a block counts "
    caption += "once however often it runs. In a gated MLP the sign depends on how the weights are written, "
    caption += "and only the height of both together is a property of what the model computes."
    return Figure(
        name="neurons",
        title="Prediction and suppression neurons",
        paper="figure 63 by our reading: the neuron fractions",
        subtitle=f"kurtosis of the logit effect above {' and '.join(thresholds)} (normal distribution: 3)",
        columns=len(panels),
        panels=panels,
        tables=tables,
        absent=absent,
        caption=[caption, *(_seen(each.label, found) for each, found in drawn)],
    )


def _table(found: xr.Dataset) -> pd.DataFrame:
    """A row a block and kind: the bar from `low` to `high`, which stands on the other kind's."""
    share_KB = found["share"].values
    high_KB = share_KB.cumsum(axis=0)
    kind, block = (each.ravel() for each in np.indices(share_KB.shape))
    return pd.DataFrame(
        {
            "kind": np.array(KINDS)[kind],
            "from": block - 0.4,
            "to": block + 0.4,
            "low": (high_KB - share_KB).ravel(),
            "high": high_KB.ravel(),
            "share": share_KB.ravel(),
            "stage": found["stage"].values[block],
            "layer": found["layer"].values[block],
            "median": found["kurtosis"].sel(quantile=0.5).values[block],
        }
    )


def _bars(found: xr.Dataset, most: float) -> alt.Chart:
    color = alt.Color(
        "kind:N", title=None, sort=list(KINDS), scale=alt.Scale(domain=list(KINDS), range=list(KIND_COLORS))
    )
    scale = alt.Scale(domain=[0, 1.04 * most or 1], nice=False)
    y = alt.Y("low:Q", scale=scale, axis=alt.Axis(title="share of neurons", format=".2~%", tickCount=6))
    tooltip = [
        alt.Tooltip("kind:N"),
        alt.Tooltip("share:Q", format=".3~%"),
        alt.Tooltip("stage:N"),
        alt.Tooltip("layer:Q", format="d"),
        alt.Tooltip("median:Q", title="median kurtosis", format=".3~g"),
    ]
    bars = alt.Chart().mark_rect(clip=True)
    return bars.encode(x=_x("from", found), x2="to:Q", y=y, y2="high:Q", color=color, tooltip=tooltip)


def _x(field: str, found: xr.Dataset) -> alt.X:
    scale = alt.Scale(domain=[-0.5, found.sizes["block"] - 0.5], nice=False)
    axis = alt.Axis(title="block, in the order they first run", format="d", tickMinStep=1)
    return alt.X(f"{field}:Q", scale=scale, axis=axis)


def _shading(found: xr.Dataset) -> list[alt.Chart]:
    """Prelude, core and coda behind the bars, with their names; nothing where there is one stage alone."""
    stage_B = found["stage"].values
    edges = [0, *(np.flatnonzero(stage_B[1:] != stage_B[:-1]) + 1).tolist(), len(stage_B)]
    spans = [
        {"from": start - 0.5, "to": stop - 0.5, "stage": str(stage_B[start])}
        for start, stop in pairwise(edges)
    ]
    if len(spans) < 2 and spans[0]["stage"] != "core":
        return []
    base = alt.Chart(alt.InlineData(values=spans))
    shades = alt.Scale(domain=list(STAGE_COLORS), range=list(STAGE_COLORS.values()))
    rectangles = base.mark_rect().encode(
        x=_x("from", found),
        x2="to:Q",
        y=alt.value(0),
        y2=alt.value("height"),
        fill=alt.Fill("stage:N", legend=None, scale=shades),
    )
    names = base.mark_text(align="left", dx=4, dy=10, fontSize=10.5, color="#77766f")
    return [rectangles, names.encode(x=_x("from", found), y=alt.value(0), text="stage:N")]


def _seen(label: str, found: xr.Dataset) -> str:
    total_B = found["share"].sum("kind").values
    if not total_B.any():
        return f"In {label} there are none: the largest kurtosis is {number(float(found['kurtosis'].max()))}."
    top = int(total_B.argmax())
    prediction, suppression = (float(value) for value in found["share"].values[:, top])
    start = int(np.flatnonzero(total_B > 0)[0])
    return (
        f"In {label} {_place(found, start)} is the first block that has any, and {_place(found, top)} has "
        f"most: {prediction:.1%} prediction and {suppression:.1%} suppression neurons."
    )


def _place(found: xr.Dataset, block: int) -> str:
    return f"{found['stage'].values[block]} layer {found['layer'].values[block]}"
