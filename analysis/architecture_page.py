"""The architecture study as files: tables, figures, and one page with the numbers first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .architecture_axes import WORDS, label_of, values_of, varying
from .architecture_figures import figures_of
from .architecture_study import DISTANCES_AFTER, ArchitectureStudy, architecture_study
from .captions import number
from .marks import Figure
from .page import render_page, write_page
from .verdicts import CONVERGED_STEP, DISTINCT_COSINE

_PNG_SCALE = 2.0
_MOST_ROWS = 24  # that stand open on the page
# title, unit, definition of what a combination's row shows beside its verdicts
_COLUMNS = {
    **{
        f"distance_after_{times}": (f"Distance after {times}", "share of the norm", "")
        for times in DISTANCES_AFTER
    },
    "last_step": (
        "Last step",
        "share of the norm",
        "how far the last recurrence moved the residual, over its norm",
    ),
    "least_cosine": (
        "Least cosine",
        "",
        "of two layers' residuals after the last recurrence, the pair that is furthest apart",
    ),
    "half_life": ("Half-life", "recurrences", "in how many recurrences the slowest layer's steps halve"),
    "fixed_point": ("Settled direction", "share of tokens", ""),
    "orbit": (
        "On an orbit",
        "share of tokens",
        "whose last layer comes back again and again, or settled: comes to rest; by its direction alone, our "
        "reading of appendix C",
    ),
}


def write_architecture_study(stores: Sequence[str | Path | xr.Dataset], out_dir: str | Path) -> list[Path]:
    """Tables (csv), figures (png, svg) and the page of an architecture study.

    Args:
        stores: captures of `random:` models, one a combination and seed.
    Returns:
        paths written, the page last.
    Raises:
        ArchitectureError: as `architecture_study`.
    """
    out_dir, paths = Path(out_dir), []
    study = architecture_study(stores)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, table in study.tables.items():
        paths.append(out_dir / f"{name}.csv")
        table.to_csv(paths[-1], index=False, float_format="%.7g")
    figures = figures_of(study)
    for figure in figures:
        for ending, scale in (("png", _PNG_SCALE), ("svg", 1.0)):
            paths.append(out_dir / f"{figure.name}.{ending}")
            figure.chart().save(paths[-1], scale_factor=scale)
    return [*paths, write_page(_render(study, figures), out_dir / "report.html")]


def _render(study: ArchitectureStudy, figures: Sequence[Figure]) -> str:
    combinations = study.combinations
    places = varying(combinations)
    shown = [name for name in _COLUMNS if np.isfinite(combinations[name].max())]
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
        head=[_COLUMNS[name][:2] for name in shown],
        rows=[_row(row, places, shown) for row in combinations.to_dict("records")],
        most_rows=_MOST_ROWS,
        boundary_places=[WORDS[name] for name in varying(study.boundary)],
        boundary=[_boundary_row(row, varying(study.boundary)) for row in study.boundary.to_dict("records")],
        definitions=_definitions(shown),
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


def _definitions(shown: Sequence[str]) -> list[tuple[str, str]]:
    said = [
        (
            "Converges",
            f"the last step is at most {number(CONVERGED_STEP)}, and does not merely drift; as in a report's "
            "verdicts, which say why",
        ),
        ("Own fixed points", f"of those that converge, the least cosine is below {DISTINCT_COSINE}"),
        (
            "Distance after n",
            "of the residual after n recurrences to that after the last one, over its norm",
        ),
    ]
    return said + [(_COLUMNS[name][0], _COLUMNS[name][2]) for name in shown if _COLUMNS[name][2]]


def _row(row: Mapping[Any, Any], places: Sequence[str], shown: Sequence[str]) -> dict[str, object]:
    cells = [
        (_precise(name, row[name]), _band(name, row[f"{name}_low"], row[f"{name}_high"])) for name in shown
    ]
    return {
        "label": label_of(row["norm"], row["injection"]),
        "places": [f"{row[name]:g}" for name in places],
        "converged": f"{row['converged']} of {row['seeds']}",
        "is_yes": row["converged"] == row["seeds"],
        "is_no": row["converged"] == 0,
        "distinct": f"{row['distinct']} of {row['told_apart']}" if row["told_apart"] else "",
        "cells": cells,
    }


def _boundary_row(row: Mapping[Any, Any], places: Sequence[str]) -> dict[str, object]:
    least, largest = row["bracket_low"], row["bracket_high"]
    ends = [
        number(row[f"critical_gain_{end}"]) if np.isfinite(row[f"critical_gain_{end}"]) else "beyond"
        for end in ("low", "high")
    ]
    return {
        "label": label_of(row["norm"], row["injection"]),
        "places": [f"{row[name]:g}" for name in places],
        "gain": number(row["critical_gain"]) if np.isfinite(row["critical_gain"]) else "beyond the grid",
        "seeds": f"{ends[0]} to {ends[1]}" if row["inside"] else "",
        "inside": f"{row['inside']} of {row['seeds']}",
        "bracket": f"{number(least) if least else 'below'} to "
        + (number(largest) if np.isfinite(largest) else "above"),
        "changes": int(row["changes"]),
    }


def _band(name: str, low: float, high: float) -> str:
    if not np.isfinite(low) or low == high:
        return ""
    return f"{_precise(name, low)} to {_precise(name, high)}"


def _precise(name: str, value: float) -> str:
    """A cosine near 1 needs the digits that tell it from 1; steps that do not shrink never halve."""
    if name == "half_life" and value == np.inf:
        return "never"
    return f"{value:.5f}" if name == "least_cosine" and value > 0.99 else number(value)
