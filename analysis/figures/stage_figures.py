"""Figures of stages: along depth, by recurrence and layer, beside the last recurrence and a plain model."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..findings import Findings
from ..measures import MEASURES, SINK_SCORE
from .answer_figures import answer_figure, counts_of, curve, drawn_of, numbers, with_band
from .axes import value_domain, y_axis
from .choices import ALL
from .marks import Figure, Panel, grouped_lines
from .panels import depth_figure, group_domain, grouped_figure
from .words import core_values, least_and_largest, measure_in_words, number, place

REFERENCE_COLOR = "#23231f"
MEASURE_COLORS = ("#2b66a8", "#d96b3a", "#4fb58c", "#8a2a6b")
_ATTENTION = ("mixing_score", "sink_rate", "colsum_concentration")


def stages_by_depth(findings: Sequence[Findings]) -> Figure | None:
    """Mixing score, sink rate and ColSum concentration along realised depth (figures 7 and 8)."""
    return depth_figure(
        findings,
        name="stages_by_depth",
        title="Stages of attention by depth",
        paper="figures 7 and 8",
        rows=[(name,) for name in _ATTENTION],
        caption=f"Mixing score (entropy of attention rows), sink rate (share of heads that put {SINK_SCORE} "
        "or more on the first key) and ColSum concentration (0: all keys receive alike, 1: one receives "
        "all), along realised depth.",
        seen=_depth_seen,
    )


def stages_by_recurrence(findings: Sequence[Findings]) -> Figure | None:
    """Mixing score, sink rate and ColSum concentration by layer, a line a recurrence (figures 7, 8)."""
    return grouped_figure(
        findings,
        name="stages_by_recurrence",
        title="Stages of attention within each recurrence",
        paper="figures 7 and 8, by recurrence",
        measures=_ATTENTION,
        x="layer",
        group="recurrence",
        caption="The same three over the core's layers, one line a recurrence: where lines lie on one "
        "another, every recurrence repeats the same stages.",
        seen=_recurrence_seen,
    )


def stages_by_layer(findings: Sequence[Findings]) -> Figure | None:
    """Mixing score, sink rate and ColSum concentration by recurrence, a line a layer (figures 7, 8)."""
    return grouped_figure(
        findings,
        name="stages_by_layer",
        title="Stages of attention of each layer across recurrences",
        paper="figures 7 and 8, by layer",
        measures=_ATTENTION,
        x="recurrence",
        group="layer",
        caption="The same three over recurrences, one line a layer: a flat line is a layer that does the "
        "same in every recurrence.",
        seen=_layer_seen,
    )


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


def profiles_beside_the_reference(findings: Sequence[Findings]) -> Figure | None:
    """Each recurrence's profile over the core's layers, and the feedforward model's (figures 7 and 8)."""
    drawn, absent = drawn_of(findings, "reference")
    if not drawn:
        return None
    tables = {f"profiles {each.label}": _profiles_table(each, found) for each, found in drawn}
    domain = group_domain([each for each, _ in drawn], "recurrence")
    layers = group_domain([each for each, _ in drawn], "layer")
    panels = []
    for name in dict.fromkeys(str(name) for _, found in drawn for name in found["measure"].values):
        about = MEASURES[name]
        values = [table[name].to_numpy(float) for table in tables.values() if name in table]
        options = y_axis(f"{about.title} ({about.unit})", value_domain(values, [], about.log), about.log)
        for (each, found), key in zip(drawn, tables, strict=True):
            if name in found["measure"]:
                panels.append(_profiles_panel(each.label, key, name, layers, domain, options, len(drawn) > 1))
    caption = "One line a recurrence over the core's layers, and dashed the feedforward model that stands "
    caption += "beside it in this report, its layers at the same relative depth."
    return Figure(
        name="profiles_beside_the_reference",
        title="Stages within each recurrence, beside the feedforward model's",
        paper="figures 7 and 8, beside the feedforward model",
        subtitle=counts_of(drawn),
        columns=len(drawn) if len(drawn) > 1 else 2,
        panels=panels,
        tables=tables,
        group="recurrence",
        group_domain=domain,
        absent=absent,
        caption=[
            caption,
            *(
                f"In {each.label} the dashed line is {found.attrs['reference']} ({found.attrs['layers']})."
                for each, found in drawn
            ),
        ],
    )


def _depth_seen(each: Findings) -> str:
    parts = []
    for name, what in (
        ("mixing_score", "mixing runs from {low} to {high} nat"),
        ("sink_rate", "{low} to {high} of the heads are sinks"),
        ("colsum_concentration", "ColSum concentration runs from {low} to {high}"),
    ):
        if name in each.measures:
            value_D = each.measures[name].sel(statistic="value").values
            if np.isfinite(value_D).any():
                ends = least_and_largest(value_D)
                low, high = _apart(*value_D[list(ends)])
                flat = f"{measure_in_words(name)} is {low} throughout"
                low, high = (
                    f"{low} ({place(each.depths, ends[0])})",
                    f"{high} ({place(each.depths, ends[1])})",
                )
                parts.append(flat if np.ptp(value_D[list(ends)]) == 0 else what.format(low=low, high=high))
    return f"In {each.label} {', '.join(parts)}." if parts else ""


def _apart(low: float, high: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart."""
    if f"{low:.3g}" != f"{high:.3g}" or low == high:
        return number(low), number(high)
    digits = next((digits for digits in range(4, 9) if f"{low:.{digits}g}" != f"{high:.{digits}g}"), 9)
    return f"{low:.{digits}g}", f"{high:.{digits}g}"


def _recurrence_seen(each: Findings) -> str:
    parts = []
    for name in ("mixing_score", "colsum_concentration"):
        value_RL = core_values(each, name, looped=False)
        if (
            value_RL is None
            or value_RL.shape[0] < 2
            or value_RL.shape[1] < 3
            or np.ptp(value_RL, axis=1).min() == 0
        ):
            continue
        agreement_R = [float(np.corrcoef(row, value_RL[-1])[0, 1]) for row in value_RL[:-1]]
        later = f" and at least {min(agreement_R[1:]):.2f} after it" if len(agreement_R) > 1 else ""
        parts.append(f"{measure_in_words(name)} {agreement_R[0]:.2f} at recurrence 0{later}")
    if not parts:
        return ""
    text = f"In {each.label} the profile over layers correlates with the last recurrence's by "
    return text + f"{'; '.join(parts)}."


def _layer_seen(each: Findings) -> str:
    value_RL = core_values(each, "mixing_score", looped=False)
    if value_RL is None or len(value_RL) < 2:
        return ""
    range_L = np.ptp(value_RL, axis=0)
    late_L = np.abs(value_RL[-1] - value_RL[1])
    return (
        f"In {each.label} the mixing score of layer {int(range_L.argmax())} moves most across recurrences, "
        f"by {number(range_L.max())} nat; between recurrence 1 and the last no layer moves by more than "
        f"{number(late_L.max())} nat, while layers differ by {number(np.ptp(value_RL[-1]))} nat."
    )


def _profiles_table(each: Findings, found: xr.Dataset) -> pd.DataFrame:
    """A row for each recurrence and layer, and recurrence -1 for the reference; a column a measure."""
    R, L = each.depths.core_RL.shape
    columns = {"recurrence": np.repeat(np.arange(-1, R), L), "layer": np.tile(np.arange(L), R + 1)}
    for name in map(str, found["measure"].values):
        value_RL = each.measures[name].sel(statistic="value").values[each.depths.core_RL]
        columns[name] = np.concatenate([found["profile"].sel(measure=name).values[None], value_RL]).ravel()
    return pd.DataFrame(columns)


def _profiles_panel(
    label: str,
    table: str,
    name: str,
    layers: tuple[int, int],
    domain: tuple[int, int],
    options: dict[str, Any],
    beside: bool,
) -> Panel:
    about = MEASURES[name]
    tooltip = [alt.Tooltip(f"{name}:Q", title=about.title.lower(), format=".4~g")]
    tooltip += [alt.Tooltip(f"{each}:Q", format="d") for each in ("layer", "recurrence")]
    lines, hover = grouped_lines(
        x="layer", x_domain=layers, y=name, y_options=options, group="recurrence", domain=domain,
        log=about.log, band=False, tooltip=tooltip,
    )  # fmt: skip
    reference = alt.Chart().transform_filter("datum.recurrence == -1")
    reference = reference.mark_line(strokeDash=[5, 3], strokeWidth=1.8, color=REFERENCE_COLOR, clip=True)
    place = alt.X("layer:Q", scale=alt.Scale(domain=list(layers), nice=False))
    return Panel(
        label=f"{about.title}, {label}" if beside else about.title,
        data=table,
        columns=("recurrence", "layer", name),
        layers=[*lines, reference.encode(x=place, y=alt.Y(f"{name}:Q", **options))],
        hover=hover,
        chosen={"recurrence": ALL, "layer": ALL},
    )


def _stages_table(found: xr.Dataset) -> pd.DataFrame:
    frame = with_band(found["correlation"])
    frame["measure"] = [str(name).replace("_", " ") for name in frame["measure"]]
    return frame.loc[:, ["measure", "recurrence", "value", "low", "high"]]


def _stages_layers(table: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> list[alt.Chart]:
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
