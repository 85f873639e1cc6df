"""The depth study as files: tables, figures, and one page with the numbers first."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...capture.store.plan import plan_of
from ...errors import os_errors_named
from ..figures.marks import Figure
from ..figures.pictures import save_figures
from ..figures.words import number
from ..findings import Findings, find
from ..pages.page import model_facts, render_page, unchecked_charts, write_page
from ..streaming import as_dataset
from .depth_figures import ends_by_count, stages_by_count
from .depth_study import ENDS, depth_study, study_tables


def write_depth_study(stores: Sequence[str | Path | xr.Dataset], own: int, out_dir: str | Path) -> list[Path]:
    """Tables (csv), figures (png, svg) and the page of a depth study.

    Args:
        stores: captures of one model and data, one a recurrence count. own: the model's own count.
    Returns:
        paths written, the page last.
    Raises:
        StudyError: what `depth_study` refuses.
    """
    out_dir = Path(out_dir)
    with os_errors_named(out_dir, "written"):
        out_dir.mkdir(parents=True, exist_ok=True)
    datasets = [as_dataset(store) for store in stores]
    study = depth_study(datasets, own)
    tables, paths = study_tables(study), []
    for name, table in tables.items():
        paths.append(out_dir / f"{name}.csv")
        with os_errors_named(paths[-1], "written"):
            table.to_csv(paths[-1], index=False)
    figures = [ends_by_count(study, tables), stages_by_count(study, tables)]
    paths += save_figures(figures, out_dir)
    (largest,) = find([max(datasets, key=lambda dataset: dataset.sizes["depth"])])
    page = _render(study, tables["counts"], figures, largest)
    return [*paths, write_page(page, out_dir / "report.html")]


@unchecked_charts()
def _render(study: xr.Dataset, counts: pd.DataFrame, figures: Sequence[Figure], largest: Findings) -> str:
    from ..figures.convergence_figures import distance_to_the_fixed_point, steps
    from ..figures.loop_state_figures import lens
    from ..figures.stage_figures import stages_by_recurrence

    draws = (steps, distance_to_the_fixed_point, stages_by_recurrence, lens)
    of_the_largest = [figure for draw in draws if (figure := draw([largest])) is not None]
    size, most, plan = study.attrs, int(study["count"][-1]), plan_of(study)
    facts = model_facts(plan)
    del facts["Loop"], facts["Notation"]  # which differ from count to count
    facts["Data"] = plan.data.name
    return render_page(
        "depth_study.html",
        title=f"{facts['Model'].rstrip('/').rsplit('/', 1)[-1]} at {study.sizes['count']} recurrence counts",
        lead=f"{size['num_sequences']:,} sequences, {size['num_tokens']:,} tokens at every count; "
        f"the model's own count is {size['own']}.",
        figures=[*figures, *of_the_largest],
        findings=[largest],
        num_study=len(figures),
        most=most,
        facts=[(name, [value]) for name, value in facts.items()],
        head=[(each.title, each.unit) for each in ENDS.values()],
        rows=[_row(row) for row in counts.to_dict("records")],
        definitions=[(each.title, each.definition) for each in ENDS.values()],
    )


def _row(row: dict[Hashable, Any]) -> dict[str, object]:
    cells = []
    for name in ENDS:
        value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        band = f"{number(low)} to {number(high)}" if np.isfinite(low) else ""
        cells.append((_precise(name, value), band))
    return {"count": int(row["recurrences"]), "is_own": bool(row["is_own"]), "cells": cells}


def _precise(name: str, value: float) -> str:
    """Returns a number as text; a cosine near 1 gets the digits that tell it from 1."""
    return f"{value:.6f}" if name == "output_cosine" and value > 0.99 else number(value)
