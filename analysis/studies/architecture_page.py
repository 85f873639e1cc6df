"""The architecture study as files: tables, figures, and one page with the numbers first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...errors import os_errors_named
from ..figures.marks import Figure
from ..figures.pictures import save_figures
from ..figures.words import number
from ..pages.page import render_page, write_page
from ..thresholds import CONVERGED_STEP, DISTINCT_COSINE
from .architecture_axes import WORDS, column, label_of, values_of, varying
from .architecture_figures import figures_of
from .architecture_study import DISTANCES_AFTER, ArchitectureStudy, architecture_study

_MOST_ROWS = 24  # rows of a table that stand open on the page
# what a combination's row shows beside its verdicts: title and definition
_COLUMNS = {
    **{f"distance_after_{times}": f"distance after {times}" for times in DISTANCES_AFTER},
    "last_step": "last step",
    "least_cosine": "least cosine",
    "half_life": "half-life",
    "fixed_point": "at rest",
    "orbit": "on an orbit",
}
_VERDICTS = (
    (
        "Converges",
        f"seeds whose last step is at most {number(CONVERGED_STEP)} and that do not merely drift: the "
        "verdict of the capture's own report",
    ),
    (
        "Own points",
        f"of those, seeds with a least cosine below {DISTINCT_COSINE}: a fixed point for each layer",
    ),
)
_DEFINITIONS = {
    "distance_after_1": (
        "Distance after n",
        "of the residual after n recurrences to that after the last one, over its norm",
    ),
    "last_step": ("Last step", "how far the last recurrence moved the residual, over its norm"),
    "least_cosine": (
        "Least cosine",
        "of two layers' residuals after the last recurrence, the two that are furthest apart",
    ),
    "half_life": ("Half-life", "recurrences in which the slowest layer's steps halve"),
    "orbit": (
        "At rest, on an orbit",
        "share of tokens whose last layer comes to rest, or comes back again and again, by its direction "
        "alone: our reading of appendix C",
    ),
}


def write_architecture_study(stores: Sequence[str | Path | xr.Dataset], out_dir: str | Path) -> list[Path]:
    """Tables (csv), figures (png, svg) and the page of an architecture study.

    Args:
        stores: captures of `random:` models, one a combination and seed.
    Returns:
        paths written, the page last.
    Raises:
        ArchitectureError: what `architecture_study` refuses.
    """
    out_dir, paths = Path(out_dir), []
    study = architecture_study(stores)
    with os_errors_named(out_dir, "written"):
        out_dir.mkdir(parents=True, exist_ok=True)
    for name, table in study.tables.items():
        paths.append(out_dir / f"{name}.csv")
        with os_errors_named(paths[-1], "written"):
            table.to_csv(paths[-1], index=False, float_format="%.7g")
    figures = figures_of(study)
    paths += save_figures(figures, out_dir)
    return [*paths, write_page(_render(study, figures), out_dir / "report.html")]


def _render(study: ArchitectureStudy, figures: Sequence[Figure]) -> str:
    combinations = study.combinations
    places = varying(combinations)
    shown = [name for name in _COLUMNS if not np.isnan(column(combinations, name)).all()]
    seeds = len(values_of(study.captures, "seed"))
    return render_page(
        "architecture_study.html",
        title=f"Random initialisation: {len(combinations)} architectures",
        lead=f"{len(study.captures):,} captures: {len(combinations):,} combinations, {seeds} seeds; "
        f"{study.num_sequences:,} sequences, {study.num_tokens:,} tokens in each.",
        figures=figures,
        findings=[],
        facts=_facts(study),
        places=[WORDS[name] for name in places],
        head=[_COLUMNS[name] for name in shown],
        rows=[_row(row, places, shown) for row in combinations.to_dict("records")],
        most_rows=_MOST_ROWS,
        boundary_places=[WORDS[name] for name in varying(study.boundary)],
        boundary=[
            _boundary_row(row, varying(study.boundary), values_of(study.captures, "gain"))
            for row in study.boundary.to_dict("records")
        ],
        definitions=[*_VERDICTS, *(_DEFINITIONS[name] for name in shown if name in _DEFINITIONS)],
    )


def _facts(study: ArchitectureStudy) -> list[tuple[str, list[str]]]:
    facts = {"Norms": ", ".join(dict.fromkeys(study.captures["norm"]))}
    answers = values_of(study.captures, "injection")
    facts["Injection"] = ", ".join("yes" if each else "no" for each in answers[::-1])
    for name in (*WORDS, "seed"):
        facts[WORDS.get(name, "seed").capitalize()] = ", ".join(
            f"{v:g}" for v in values_of(study.captures, name)
        )
    facts["Data"] = study.data
    return [(name, [value]) for name, value in facts.items()]


def _row(row: Mapping[Any, Any], places: Sequence[str], shown: Sequence[str]) -> dict[str, object]:
    cells = []
    for name in shown:
        value, low, high = (
            _precise(name, row[f"{name}{end}"], row["recurrences"]) for end in ("", "_low", "_high")
        )
        cells.append((value, f"{low}\N{EN DASH}{high}" if low != high else ""))
    return {
        "label": label_of(row["norm"], row["injection"]),
        "places": [f"{row[name]:g}" for name in places],
        "converged": f"{row['converged']} of {row['seeds']}",
        "is_yes": row["converged"] == row["seeds"],
        "is_no": row["converged"] == 0,
        "distinct": f"{row['distinct']} of {row['told_apart']}" if row["told_apart"] else "",
        "cells": cells,
    }


def _boundary_row(row: Mapping[Any, Any], places: Sequence[str], gains: Sequence[float]) -> dict[str, object]:
    below, above = f"below {gains[0]:g}", f"above {gains[-1]:g}"
    outside = below if row["below"] > row["above"] else above
    low = row["critical_gain_low"] if not row["below"] else 0.0
    high = row["critical_gain_high"] if not row["above"] else np.inf
    ends = [below if not end else above if np.isinf(end) else number(end) for end in (low, high)]
    return {
        "label": label_of(row["norm"], row["injection"]),
        "places": [f"{row[name]:g}" for name in places],
        "gain": number(row["critical_gain"]) if np.isfinite(row["critical_gain"]) else outside,
        "seeds": f"{ends[0]} to {ends[1]}" if row["inside"] else "",
        "inside": f"{row['inside']} of {row['seeds']}",
        "bracket": _between(row["bracket_low"], row["bracket_high"]),
        "changes": int(row["changes"]),
    }


def _between(low: float, high: float) -> str:
    if not low:
        return f"below {high:g}" if np.isfinite(high) else "the whole grid and beyond"
    return f"{low:g} to {high:g}" if np.isfinite(high) else f"above {low:g}"


def _precise(name: str, value: float, recurrences: int) -> str:
    """Returns a number as text: a cosine near 1 with more digits, a half-life of at most what was run."""
    if name == "half_life" and value > recurrences:
        return f"over {recurrences}"
    if np.isnan(value):
        return ""
    return f"{value:.5f}" if name == "least_cosine" and value > 0.99 else number(value)
