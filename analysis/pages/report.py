"""One page about one or several captures: verdicts, figures with captions, numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...errors import RequestError
from ..answers.heads import ANALYSES as HEADS
from ..answers.single_sequences import ANALYSES as SEQUENCES
from ..figures.words import number
from ..findings import Findings, find
from ..measures import MEASURES
from ..registry import ANALYSES
from ..verdicts import Verdict
from .page import model_facts, render_page, unchecked_charts, write_page

_TABLE_MEASURES = (
    "relative_step",
    "step_cosine",
    "relative_gap",
    "residual_norm",
    "mixing_score",
    "entropy_change",
    "sink_rate",
    "colsum_concentration",
)
_MOST_ROWS = 16
_OF_MEASURES = {each.name for each in (*HEADS, *SEQUENCES)}  # missing where the measure itself is


def write_report(
    stores: Sequence[str | Path | xr.Dataset], out_path: str | Path, title: str | None = None
) -> Path:
    """Writes the page about these captures, side by side.

    Args:
        stores: paths of stores, or Datasets laid out like one; at least one.
        out_path: the HTML file; directories above it are made.
        title: heading of the page; made from the captures if left out.
    Returns:
        the path written.
    Raises:
        RequestError: no store was given.
        NothingCapturedError: a store has no finished sequence yet.
    """
    if not stores:
        raise RequestError("no store was given: name at least one to report on")
    return write_page(render(find(stores), title), out_path)


@unchecked_charts()
def render(findings: Sequence[Findings], title: str | None = None) -> str:
    """Renders the page as HTML."""
    from ..figures import catalogue

    return render_page(
        "report.html",
        title=title or _title(findings),
        lead=_lead(findings),
        figures=[figure for draw in catalogue.FIGURES if (figure := draw(findings)) is not None],
        findings=findings,
        facts=_facts(findings),
        verdicts=[_verdict_row(row) for row in zip(*(each.verdicts for each in findings), strict=True)],
        missing=_missing(findings),
        numbers=[_numbers(each) for each in findings],
        plans=[(each.label, _document(each)) for each in findings],
        definitions=[MEASURES[name] for name in _TABLE_MEASURES],
    )


def _document(each: Findings) -> str:
    """The plan as it stands in the store."""
    return json.dumps(each.measures.attrs["plan"], indent=2, ensure_ascii=False)


def _title(findings: Sequence[Findings]) -> str:
    labels = [each.label for each in findings]
    return "Inside the loop: " + (" beside ".join(labels) if len(labels) <= 2 else f"{len(labels)} captures")


def _lead(findings: Sequence[Findings]) -> str:
    """Says how much was captured, once if it is the same for all."""
    counts = {}
    for each in findings:
        size = each.measures.attrs
        text = f"{size['num_sequences']:,} sequences, {size['num_tokens']:,} tokens, "
        counts.setdefault(text + f"{len(each.depths):,} block invocations a token", []).append(each.label)
    if len(counts) == 1:
        return f"{next(iter(counts))}{', each' if len(findings) > 1 else ''}."
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in counts.items()) + "."


def _facts(findings: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """Returns what was captured: a name, and each capture's value."""
    rows: dict[str, list[str]] = {}
    for each in findings:
        plan, measures = each.plan, each.measures.attrs
        data = plan.data
        done, total = each.units
        facts = model_facts(plan) | {
            "Data": data.name + (f", field {data.field}" if data.field else ""),
            "Captured": f"{measures['num_sequences']:,} sequences, {measures['num_tokens']:,} tokens",
            "Units done": f"{done:,} of {total:,}" + ("" if done == total else ": unfinished"),
            "Non-finite values": f"{int(each.measures['non_finite'].sum()):,}",
            "Planned on": plan.created or "not recorded",
        }
        for name, value in facts.items():
            rows.setdefault(name, []).append(value)
    return list(rows.items())


def _verdict_row(row: Sequence[Verdict]) -> dict[str, Any]:
    asked = row[0].question
    return {
        "question": asked.text,
        "figure": asked.figure,
        "threshold": f"{asked.relation} {number(asked.threshold)} {asked.unit}",
        "reason": asked.reason,
        "source": asked.source,
        "cells": [
            {
                "answer": verdict.answer_in_words,
                "value": None if verdict.value is None else f"{_precise(verdict)} {asked.unit}",
                "since": verdict.recurrence,
                "detail": verdict.detail,
            }
            for verdict in row
        ],
    }


def _precise(verdict: Verdict) -> str:
    """Returns a number as text; a cosine near 1 gets the digits that tell it from the threshold."""
    assert verdict.value is not None
    is_near_1 = verdict.question.unit == "cosine" and verdict.value > 0.99
    return f"{verdict.value:.6f}" if is_near_1 else number(verdict.value)


def _missing(findings: Sequence[Findings]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns what could not be computed, by reason, for each capture."""
    result = []
    for each in findings:
        reasons: dict[str, list[str]] = {}
        for name, why in each.measures.attrs["missing"].items():
            reasons.setdefault(why, []).append(MEASURES[name].title.lower())
        for name, value in each.answers.items():
            if isinstance(value, str) and name not in _OF_MEASURES:
                reasons.setdefault(value, []).append(ANALYSES[name].title.lower())
        if reasons:
            result.append((each.label, [(", ".join(names), why) for why, names in reasons.items()]))
    return result


def _numbers(each: Findings) -> dict[str, Any]:
    """The table: means over the core's layers at some recurrences, or depths of a feedforward model."""
    names = [name for name in _TABLE_MEASURES if name in each.measures]
    core_RL = each.depths.core_RL
    num_rows = len(core_RL) or len(each.depths)
    groups = core_RL if len(core_RL) else np.arange(num_rows)[:, None]
    picked = _picked(num_rows)
    rows = []
    for row in picked:
        values = [each.measures[name].sel(statistic="value").values[groups[row]] for name in names]
        rows.append([str(row), *(_cell(name, value) for name, value in zip(names, values, strict=True))])
    return {
        "label": each.label,
        "head": ["recurrence" if len(core_RL) else "depth", *(MEASURES[name].title for name in names)],
        "units": ["", *(MEASURES[name].unit for name in names)],
        "rows": rows,
        "of": "mean over the core's layers" if len(core_RL) else "one row a depth",
    }


def _cell(name: str, value_L: np.ndarray) -> str:
    finite_L = value_L[np.isfinite(value_L)]
    if not len(finite_L):
        return ""
    mean = float(finite_L.mean())
    return f"{mean:.6f}" if name == "step_cosine" else number(mean)


def _picked(num_rows: int) -> list[int]:
    """All rows if few; else 0, the powers of two and the last."""
    if num_rows <= _MOST_ROWS:
        return list(range(num_rows))
    powers = [2**power for power in range(num_rows.bit_length()) if 2**power < num_rows - 1]
    return [0, *powers, num_rows - 1]
