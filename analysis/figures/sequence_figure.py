"""The figure of single sequences: what one of them does, over the mean of all in grey."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from ..answers.single_sequences import SEQUENCE_MEASURES, gathered
from ..findings import Findings
from ..measures import MEASURES
from .answer_figures import Drawn, drawn_by
from .axes import depth_axis, note_in_place, stage_shading, value_domain, y_axis
from .choices import ALL, EVERYWHERE, Choice, chosen, fading
from .marks import Figure, Panel, depth_lines, grouped_lines
from .panels import group_domain, means_over
from .words import number

_MEAN = -1  # stands for the mean in the column of sequence ids
_GREY = "#b5b4ad"


def single_sequences(findings: Sequence[Findings]) -> Figure | None:
    """Measures of up to sixteen single sequences: a line per layer over recurrences, or one along depth."""
    drawn, absent = drawn_by(findings, lambda each: gathered(each.answers))
    if not drawn:
        return None
    names = [name for name in SEQUENCE_MEASURES if any(name in found for _, found in drawn)]
    names.sort(key=lambda name: sum(name not in found for _, found in drawn))  # what all have comes first
    tables = {_table_name(each): _table(each, found) for each, found in drawn}
    looped = [each for each, _ in drawn if _loops(each)]
    sequences = _sequences(drawn)
    first_id = int(next(iter(sequences.options)))
    domain = group_domain(looped, "layer") if looped else (0, 0)
    options = {name: _y(name, tables.values()) for name in names}
    panels = []
    for each, found in drawn:
        first, *others = [_panel(each, found, name, options[name], looped, first_id) for name in names]
        panels.append(replace(first, instead=others))
    measure = Choice(name="measure", label="Measure", options={name: MEASURES[name].title for name in names})
    return Figure(
        name="single_sequences",
        title="Single sequences against the mean",
        paper="",
        subtitle=f"in colour: sequence {first_id} of the data, or the one chosen; in grey: "
        + means_over([each for each, _ in drawn], banded=False),
        columns=len(panels),
        panels=panels,
        tables=tables,
        group="layer" if looped else None,
        group_domain=domain,
        choices=[sequences, measure],
        absent=absent,
        notes=[
            f"{each.label}: {found.sizes['sequence']} of {each.measures.attrs['num_sequences']:,} sequences "
            "are kept, the first of each of so many equal parts of the capture."
            for each, found in drawn
            if found.sizes["sequence"] < each.measures.attrs["num_sequences"]
        ],
        caption=[
            "One sequence's own mean over its tokens, over the mean of all sequences in grey: where the two "
            "part, the mean is not what every sequence does.",
            *filter(None, (_seen(each, found, names[0]) for each, found in drawn)),
        ],
    )


def _table_name(each: Findings) -> str:
    return f"sequences {each.label}"


def _loops(each: Findings) -> bool:
    return len(each.depths.core_RL) > 1


def _table(each: Findings, found: xr.Dataset) -> pd.DataFrame:
    """A row per depth of every sequence and of the mean, whose id is -1; a column per measure."""
    mean = each.measures[list(found.data_vars)].sel(statistic="value", drop=True)
    columns = ["sequence", "depth", "layer", "recurrence", *map(str, found.data_vars)]
    own = found.to_dataframe().reset_index().assign(sequence=lambda table: table["sequence_id"])
    whole = mean.to_dataframe().reset_index().assign(sequence=_MEAN)
    return pd.concat([own, whole], ignore_index=True).loc[:, columns]


def _sequences(drawn: Drawn) -> Choice:
    """The sequences by their row in the data, with their numbers of tokens; first those that all have."""
    tokens: dict[int, list[int]] = {}
    for _, found in drawn:
        for row, num in zip(found["sequence_id"].values, found["num_tokens"].values, strict=True):
            tokens.setdefault(int(row), []).append(int(num))
    rows = sorted(tokens, key=lambda row: -len(tokens[row]))
    options = {str(row): f"{row} ({_tokens(dict.fromkeys(tokens[row]))})" for row in rows}
    return Choice(name="sequence", label="Sequence", options=options)


def _tokens(lengths: Collection[int]) -> str:
    return " or ".join(f"{num:,}" for num in lengths) + (" token" if list(lengths) == [1] else " tokens")


def _y(name: str, tables: Iterable[pd.DataFrame]) -> dict[str, Any]:
    values = [np.asarray(table[name], float) for table in tables if name in table]
    about = MEASURES[name]
    return y_axis(f"{about.title} ({about.unit})", value_domain(values, [], about.log), about.log)


def _panel(
    each: Findings,
    found: xr.Dataset,
    name: str,
    y_options: dict[str, Any],
    looped: Sequence[Findings],
    first_id: int,
) -> Panel:
    when = {"measure": name}
    if name not in found:
        note = note_in_place(f"{MEASURES[name].title}: not captured")
        return Panel(label=each.label, data=_table_name(each), columns=("depth",), layers=[note], when=when)
    draw = _over_recurrences if _loops(each) else _along_depth
    layers, hover = draw(each, name, y_options, looped)
    layers.append(_not_kept(found["sequence_id"].values))
    return Panel(
        label=each.label,
        data=_table_name(each),
        columns=("sequence", "depth", "layer", "recurrence", name),
        layers=layers,
        hover=hover,
        chosen=dict.fromkeys(EVERYWHERE, ALL) | {"sequence": first_id},
        when=when,
    )


_OWN = f"datum.sequence == {chosen('sequence')}"
_Marks = tuple[list[alt.Chart], list[alt.Chart]]


def _over_recurrences(
    each: Findings, name: str, y_options: dict[str, Any], looped: Sequence[Findings]
) -> _Marks:
    first, last = max(0, MEASURES[name].first), group_domain(looped, "recurrence")[1]
    x = {"x": "recurrence", "x_domain": (first, last)}
    lines, hover = grouped_lines(
        **x,
        y=name,
        y_options=y_options,
        group="layer",
        domain=group_domain(looped, "layer"),
        log=MEASURES[name].log,
        band=False,
        tooltip=_tooltip(name),
        where=f"datum.recurrence >= 0 && {_OWN}",
    )
    axis = alt.Axis(title="recurrence", tickMinStep=1, format="d")
    place = alt.X("recurrence:Q", axis=axis, scale=alt.Scale(domain=[first, last], nice=False))
    mean = _mean(name, y_options, place).transform_filter("datum.recurrence >= 0")
    return [mean.encode(detail="layer:N", opacity=fading(1.0, "layer")), *lines], hover


def _along_depth(each: Findings, name: str, y_options: dict[str, Any], looped: Sequence[Findings]) -> _Marks:
    lines, hover = depth_lines(
        y=name,
        y_options=y_options,
        num_depths=len(each.depths),
        log=MEASURES[name].log,
        band=False,
        tooltip=_tooltip(name),
        where=_OWN,
    )
    shading = stage_shading(each.depths)
    return [*shading, _mean(name, y_options, depth_axis(len(each.depths))), *lines], hover


def _mean(name: str, y_options: dict[str, Any], x: alt.X) -> alt.Chart:
    """The mean over all sequences in grey."""
    shown = f"datum.sequence == {_MEAN} && isValid(datum.{name})"
    shown += f" && datum.{name} > 0" if MEASURES[name].log else ""
    base = alt.Chart().transform_filter(shown).mark_line(color=_GREY, strokeWidth=1.4, clip=True)
    return base.encode(x=x, y=alt.Y(f"{name}:Q", **y_options))


def _not_kept(sequence_id: np.ndarray) -> alt.Chart:
    """Words where the chosen sequence is another capture's."""
    kept = f"indexof({sequence_id.tolist()}, {chosen('sequence')}) >= 0"
    return note_in_place("this sequence is not among those kept").transform_filter(f"!({kept})")


def _tooltip(name: str) -> list[alt.Tooltip]:
    value = alt.Tooltip(f"{name}:Q", title=MEASURES[name].title.lower(), format=".4~g")
    places = ("sequence", "layer", "recurrence", "depth")
    return [value, *(alt.Tooltip(f"{key}:Q", format="d") for key in places)]


def _seen(each: Findings, found: xr.Dataset, name: str) -> str:
    """How far apart the sequences shown are, where each is furthest along."""
    if name not in found:
        return ""
    core_RL, about = each.depths.core_RL, MEASURES[name]
    depth_L = core_RL[-1] if len(core_RL) else np.array([len(each.depths) - 1])
    value_S = found[name].values[:, depth_L].max(axis=1)
    if name == "relative_gap" and len(core_RL) > 1:  # 0 at the last recurrence by its definition
        value_S = found[name].values[:, core_RL[-2]].max(axis=1)
    if not np.isfinite(value_S).any():
        return ""
    row = [int(found["sequence_id"][index]) for index in (np.nanargmin(value_S), np.nanargmax(value_S))]
    low, high = number(float(np.nanmin(value_S))), number(float(np.nanmax(value_S)))
    when = "at the last recurrence" if len(core_RL) else "after the last block"
    if name == "relative_gap" and len(core_RL) > 1:
        when = "one recurrence before the last"
    of = "its largest over layers " if len(core_RL) else ""
    return (
        f"In {each.label} the {about.title.lower()}, {of}{when}, runs from {low} (sequence {row[0]}) to "
        f"{high} (sequence {row[1]}) {about.unit} over the {found.sizes['sequence']} sequences."
    )
