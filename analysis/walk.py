"""One walk over a store feeds every analysis: each array is read once, one unit of it in memory at a time
(states in smaller blocks, by each of the two analyses that need them).

An analysis says which quantities it needs and starts a fold, which takes one sequence after another and
ends in a Dataset. Analyses that share a quantity walk together; others walk one after the other, so that
memory holds the arrays of one such group alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pandas as pd
import xarray as xr

from ..capture.store.plan import plan_of
from ..capture.store.quantities import QUANTITIES
from ..errors import CannotTellError, NothingCapturedError
from .depth_axis import Depths, depths_of
from .kept_states import advice
from .streaming import Arrays, as_dataset, iter_sequences


class Fold(Protocol):
    """Numbers folded from the sequences so far; their size does not grow with the sequences."""

    def add(self, arrays: Arrays) -> None:
        """Takes in one sequence: arrays [token, depth, ...], or [1, ...] for one value a sequence."""
        ...

    def result(self) -> xr.Dataset:
        """Returns the answer. Raises CannotTellError if there is none."""
        ...


@dataclass(frozen=True)
class Analysis:
    """One question to a store.

    Attributes:
        name: its key in tables and files.
        title: what a heading shows.
        needs: quantities that the fold is given, and so must be captured; none where the plan or a few rows
            that it knows have the answer.
        definition: one line that says what is computed, with its source.
        start: gives a new fold for a dataset and its depths; CannotTellError where there can be none.
        first: a recurrence that must exist (0 or 1: the model must loop at least twice); -1 for none.
        tables: the answer as tables by name; a table for each of its variables if left out.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    definition: str
    start: Callable[[xr.Dataset, Depths], Fold]
    first: int = -1
    tables: Callable[[xr.Dataset], dict[str, pd.DataFrame]] | None = None


def walk(store: str | Path | xr.Dataset, analyses: Iterable[Analysis]) -> dict[str, xr.Dataset | str]:
    """Returns the answers of analyses from a store, in one reading of it.

    Args:
        store: path of a store, or a Dataset laid out like one.
        analyses: what to ask; no two of one name.
    Returns:
        by name the Dataset, with the attributes `title` and `definition`, or the reason why there is none.
    Raises:
        NothingCapturedError: no sequence is finished yet.
    """
    dataset = as_dataset(store)
    depths = depths_of(dataset)
    count_captured(dataset)
    answers: dict[str, xr.Dataset | str] = {}
    folds: dict[str, Fold] = {}
    present = []
    for each in analyses:
        reason = why_missing(each, dataset, depths)
        if reason is None:
            try:
                folds[each.name] = each.start(dataset, depths)
                present.append(each)
            except CannotTellError as error:
                reason = str(error)
        answers[each.name] = reason or ""
    for group, quantities in together(present):
        for arrays in iter_sequences(dataset, quantities) if quantities else ():
            for each in group:
                folds[each.name].add(arrays)
        for each in group:
            answers[each.name] = _result(each, folds.pop(each.name))
    return answers


def answer(store: str | Path | xr.Dataset, analysis: Analysis) -> xr.Dataset:
    """Returns the Dataset of one analysis. Raises CannotTellError if there is none."""
    found = walk(store, [analysis])[analysis.name]
    if isinstance(found, str):
        raise CannotTellError(f"{analysis.name}: {found}")
    return found


def merged(answers: Mapping[str, xr.Dataset | str], names: Iterable[str], prefix: str) -> xr.Dataset:
    """Returns the variables `name` that analyses `prefix + name` found, in one Dataset.

    Returns:
        with the attribute `missing` (name -> why it is absent).
    Raises:
        CannotTellError: none was found; the message says why.
    """
    found, missing = {}, {}
    for name in names:
        each = answers.get(prefix + name, "not asked")
        if isinstance(each, str):
            missing[name] = each
        else:
            found[name] = each[name]
    if not found:
        raise CannotTellError("; ".join(dict.fromkeys(missing.values())))
    return xr.Dataset(found, attrs={"missing": missing})


def _result(each: Analysis, fold: Fold) -> xr.Dataset | str:
    try:
        return fold.result().assign_attrs(title=each.title, definition=each.definition)
    except CannotTellError as error:
        return str(error)


class _Needing(Protocol):
    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def first(self) -> int: ...


def why_missing(each: _Needing, dataset: xr.Dataset, depths: Depths) -> str | None:
    """Says why a store cannot answer what `each` asks, and what to capture; returns None if it can."""
    num_recurrences = max(map(len, depths.loops), default=0)
    if each.first >= 0 and num_recurrences == 0:
        return "the model has no loop"
    if each.first >= 0 and num_recurrences == 1:
        return "the loop ran once: capture with at least 2 recurrences"
    if len(depths.loops) > 1 or "loop" in dataset.attrs:
        for name in each.needs:
            if "recurrence" in QUANTITIES[name].axes:
                return f"{name} is by recurrence, and the model has several loops"
    absent = [name for name in each.needs if name not in dataset]
    if "exit_probability" in absent and not plan_of(dataset).model.exit_gate:
        return "the model has no exit gate"
    if "state" in absent:
        return advice(depths, "no states are kept", "core")
    if absent:
        groups = dict.fromkeys(QUANTITIES[name].group for name in absent)
        return f"needs {' and '.join(absent)}: capture again with --quantities {' '.join(groups)}"
    return None


_Each = TypeVar("_Each", bound=_Needing)


def together(asked: Sequence[_Each]) -> list[tuple[list[_Each], list[str]]]:
    """Returns groups that share quantities, directly or through others, each with all quantities it reads."""
    groups: list[tuple[list[_Each], set[str]]] = []
    for each in asked:
        group, quantities = [each], set(each.needs)
        apart = []
        for other, others in groups:
            if others & quantities:
                group, quantities = other + group, quantities | others
            else:
                apart.append((other, others))
        groups = [*apart, (group, quantities)]
    return [(group, sorted(quantities)) for group, quantities in groups]


def count_captured(dataset: xr.Dataset) -> dict[str, int]:
    """Returns the numbers of finished sequences and of their tokens.

    Raises:
        NothingCapturedError: there is none.
    """
    length = dataset["sequence_length"].values
    if not (length > 0).any():
        done, total = int(dataset.attrs.get("units_done", 0)), dataset.sizes.get("unit", 0)
        raise NothingCapturedError(
            f"nothing is captured yet: {done} of {total} units are done; run the capture first, or again"
        )
    return {"num_sequences": int((length > 0).sum()), "num_tokens": int(length[length > 0].sum())}
