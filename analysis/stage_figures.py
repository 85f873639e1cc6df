"""Figures of stages that repeat: every recurrence beside the last one, and beside a feedforward model."""

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from .answer_figures import answer_figure, curve, numbers
from .findings import Findings
from .marks import Figure

MEASURE_COLORS = ("#2b66a8", "#d96b3a", "#4fb58c", "#8a2a6b")


def stages_repeat(findings: Sequence[Findings]) -> Figure | None:
    """Correlation of each recurrence's stages over layers with the last one's (figures 7, 8 and 32)."""
    return answer_figure(
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


def stages_like_the_reference(findings: Sequence[Findings]) -> Figure | None:
    """Correlation of each recurrence's stages with a feedforward model's (section 4.3, figures 7, 8, 32)."""
    return answer_figure(
        findings,
        "reference",
        name="stages_like_the_reference",
        title="Recurrences that repeat a feedforward model's stages",
        paper="figures 7, 8 and 32, beside the feedforward model",
        table=_stages_table,
        layers=_stages_layers,
        caption="Correlation, over the core's layers, of a recurrence's values with the mean over sequences "
        "of the feedforward model that stands beside it in this report: 1 where the same stages come at the "
        "same depth.",
        seen=_reference_seen,
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
    return curve(tables, "correlation", numbers("recurrence", "value", "low", "high"), color)


def _stages_seen(each: Findings, found: xr.Dataset) -> str:
    value = found["correlation"].sel(statistic="value")
    parts = [
        f"{str(name).replace('_', ' ')} at {value.sel(measure=name).values[0]:.3f} in the first recurrence "
        f"and {value.sel(measure=name).values[-2]:.3f} in the one before the last"
        for name in value["measure"].values
        if np.isfinite(value.sel(measure=name).values[[0, -2]]).all()
    ]
    return f"In {each.label} correlations stand for {'; '.join(parts)}." if parts else ""


def _reference_seen(each: Findings, found: xr.Dataset) -> str:
    value = found["correlation"].sel(statistic="value")
    parts = []
    for name in value["measure"].values:
        here_R = value.sel(measure=name).values
        if np.isfinite(here_R).all():
            ends = f"{here_R[0]:.2f} in the first recurrence, {here_R[-1]:.2f} in the last"
            parts.append(f"{str(name).replace('_', ' ')} {ends}")
    beside = f"In {each.label}, beside {found.attrs['reference']} ({found.attrs['layers']}), correlations are"
    return f"{beside} {'; '.join(parts)}." if parts else ""
