"""Randomly initialised loops of many architectures: which converge, and to what.

Takes the stores of `looptap study architecture`, one a combination and seed, and asks each what `looptap
report` asks: the verdicts of every capture are those of its own report. Whatever is said of a combination is
said over its seeds.

Source: arXiv 2604.11791, section 4.2 (figures 6, 29, 30, 31). Width, gain and embeddings are our own axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from ...capture.store.cell import AXES, cell_of
from ...capture.store.plan import plan_of
from ...errors import ArchitectureError
from ..answers.rates import slowest_half_life
from ..depth_axis import depths_of
from ..measures import as_analyses, assembled
from ..registry import ANALYSES
from ..streaming import as_dataset
from ..verdicts import verdicts, worst_over_layers
from ..walk import walk
from .boundary import boundary_table

DISTANCES_AFTER = (1, 8, 32, 101)  # so many recurrences, and more must follow
# what is said of a capture in one number, and of a combination by its median, least and largest over seeds
NUMBERS = (
    *(f"distance_after_{times}" for times in DISTANCES_AFTER),
    *("last_step", "least_cosine", "half_life", "fixed_point", "orbit"),
)
_ASKED = ("relative_step_median", "relative_gap_median", "entropy_change")


@dataclass(frozen=True, kw_only=True)
class ArchitectureStudy:
    """The result of an architecture study, and how much was captured in each store.

    `AXES` are columns of every table (the boundary's has no gain). Distances and steps are medians over
    tokens in the slowest layer, as shares of the residual's norm; the column `recurrence` counts from 0.
    """

    captures: pd.DataFrame
    """A row a capture: `seed`; `converged` and `distinct`, the verdicts (True, False, or None where the
    capture cannot tell); `converged_from`, the recurrence; `NUMBERS`: distances to the state of the last
    recurrence, the last step, the least mean cosine of two layers' last states, in how many recurrences the
    slowest layer's steps halve, and the shares of tokens whose last layer is at a `fixed_point` or on an
    `orbit` by its direction, as appendix C classifies them."""
    combinations: pd.DataFrame
    """A row a combination: `seeds`, how many `converged`, how many are `distinct` of how many `told_apart`;
    `NUMBERS` as medians over seeds, with `_low` and `_high`, the least and the largest."""
    distances: pd.DataFrame
    """A row a combination and recurrence but the last: `distance`, `distance_low`, `distance_high`, the same
    over seeds."""
    boundary: pd.DataFrame
    """Result of `boundary_table`; empty where no combination has several gains."""
    num_sequences: int
    num_tokens: int
    data: str

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables that have rows, by name."""
        names = ("combinations", "boundary", "captures", "distances")
        return {name: table for name in names if len(table := getattr(self, name))}


def architecture_study(stores: Sequence[str | Path | xr.Dataset]) -> ArchitectureStudy:
    """Asks every store, one at a time in memory.

    Args:
        stores: captures of `random:` models over the same data, each with steps, gaps and the core's last
            states.
    Raises:
        ArchitectureError: there is none, a store is unfinished or not of such a model, two are of one
            combination and seed, or their data differ.
    """
    rows, curves, captured = [], [], {}
    for store in stores:
        dataset = as_dataset(store)
        row, distance_R = _ask(dataset)
        rows.append(row)
        axes = {name: row[name] for name in [*AXES, "seed"]}
        curves.append(pd.DataFrame(axes | {"recurrence": range(len(distance_R)), "distance": distance_R}))
        data = plan_of(dataset).data
        captured.setdefault(data, (data.name, row["num_sequences"], row["num_tokens"]))
    if not captured:
        raise ArchitectureError("no store was given")
    if len(captured) > 1:
        raise ArchitectureError(f"the data differ: {', '.join(name for name, _, _ in captured.values())}")
    captures = pd.DataFrame(rows).drop(columns=["num_sequences", "num_tokens"])
    if (twice := captures.duplicated([*AXES, "seed"])).any():
        raise ArchitectureError(f"two captures of {_in_words(captures[twice].iloc[0])}")
    ((name, num_sequences, num_tokens),) = captured.values()
    return ArchitectureStudy(
        captures=captures,
        combinations=_combinations(captures),
        distances=_over_seeds(pd.concat(curves), [*AXES, "recurrence"], ["distance"]),
        boundary=boundary_table(captures),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        data=name,
    )


def _ask(dataset: xr.Dataset) -> tuple[dict[str, object], np.ndarray]:
    """Returns a capture's row, and its distance to the last state, [recurrence] without the last."""
    axes = vars(cell_of(plan_of(dataset).model))
    if missing := int((dataset["unit_done"].values == 0).sum()):
        raise ArchitectureError(f"{missing} units of a capture are missing: run the study again, it goes on")
    if lacking := [name for name in ("step_norm", "gap_norm") if name not in dataset]:
        raise ArchitectureError(f"a capture lacks {' and '.join(lacking)}: run the study itself")
    asked = [ANALYSES[name] for name in ("rates", "limits", "distinctness")]
    found = walk(dataset, [*as_analyses(_ASKED), *asked])
    measures = assembled(dataset, found)
    answers = {each.name: found[each.name] for each in asked}
    said = {each.question.name: each for each in verdicts(measures, answers["distinctness"], answers)}
    depths = depths_of(measures)
    distance_R = worst_over_layers(_value(measures["relative_gap_median"]), depths)
    row = axes | {
        "converged": said["converged"].answer,
        "converged_from": said["converged"].recurrence,
        "distinct": said["distinct"].answer,
        **{
            f"distance_after_{times}": distance_R[times - 1] if times < len(distance_R) else np.nan
            for times in DISTANCES_AFTER
        },
        "last_step": _or_nan(said["converged"].value),
        "least_cosine": _or_nan(said["distinct"].value),
        "half_life": slowest_half_life(found["rates"]),
        **_limits_of(found["limits"]),
    }
    sizes = {name: measures.attrs[name] for name in ("num_sequences", "num_tokens")}
    return row | sizes, distance_R[:-1]


def _value(statistics: xr.DataArray) -> np.ndarray:
    return statistics.sel(statistic="value").values


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _limits_of(limits: xr.Dataset | str) -> dict[str, float]:
    """Shares of tokens whose last layer ends at a fixed point or on an orbit, by their direction."""
    names = ("fixed_point", "orbit")
    if isinstance(limits, str):
        return dict.fromkeys(names, np.nan)
    last = limits["share"].sel(statistic="value").isel(layer=-1)
    return {name: float(last.sel(limit=name)) for name in names}


def _in_words(row: pd.Series) -> str:
    return ", ".join(f"{name} {row[name]}" for name in [*AXES, "seed"])


def _combinations(captures: pd.DataFrame) -> pd.DataFrame:
    groups = captures.groupby(AXES, sort=False)
    counts = groups.agg(
        seeds=("seed", "size"),
        converged=("converged", lambda answers: sum(answer is True for answer in answers)),
        distinct=("distinct", lambda answers: sum(answer is True for answer in answers)),
        told_apart=("distinct", lambda answers: sum(answer is not None for answer in answers)),
    ).reset_index()
    return counts.merge(_over_seeds(captures, AXES, list(NUMBERS)), on=AXES)


def _over_seeds(table: pd.DataFrame, axes: list[str], names: list[str]) -> pd.DataFrame:
    """Median, least and largest of the numbers there are, a row for each place on the axes."""
    groups = table.groupby(axes, sort=False)[names]
    ends = {"": groups.median(), "_low": groups.min(), "_high": groups.max()}
    parts = [found.add_suffix(end) for end, found in ends.items()]
    order = [f"{name}{end}" for name in names for end in ends]
    return pd.concat(parts, axis=1)[order].reset_index()
