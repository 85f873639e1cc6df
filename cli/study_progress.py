"""Progress of a study on a screen: what all of its captures take, and one bar for all of them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from ..capture.engines.events import Event, UnitFailed, WorkerJoined
from ..capture.plan import Plan
from ..capture.plan_cost import disk_bytes, memory_bytes
from ..capture.run import Outcome, run_capture
from ..capture.store.group import store_exists
from ..capture.store.writing.commit import Store
from ..capture.studies.estimate import expected_seconds
from .progress import LINE_S, Halt, console
from .tables import to_size


def run_all_with_progress(plans: Sequence[Plan]) -> list[Outcome]:
    """Runs captures one after another and prints what they take, one bar, and a line at the end.

    Raises:
        KeyboardInterrupt: it was told to stop, and captures are left.
    """
    todo = [plan for plan in plans if not _is_done(plan)]
    expected_s = expected_seconds(todo)
    _print_plans(plans, todo, sum(expected_s.values()))
    started_s = time.monotonic()
    outcomes = []
    with Halt() as halt, _study_bar(len(plans), expected_s) as bar:

        def on_event(event: Event) -> None:
            halt.may_be_in_flight |= isinstance(event, WorkerJoined)
            if isinstance(event, UnitFailed):
                console.print(f"unit {event.unit} failed three times:\n{event.error}")

        for plan in plans:
            bar.begin(plan)
            outcomes.append(run_capture(plan, on_event, lambda: not halt.is_asked))
            if halt.is_asked and (outcomes[-1].num_left or plan is not plans[-1]):
                raise KeyboardInterrupt
            bar.end(plan)
    _print_outcomes(outcomes, len(todo), time.monotonic() - started_s)
    return outcomes


class _StudyBar:
    """Counts captures; the time left is what is expected of the rest, at the pace of those that are done."""

    def __init__(self, progress: Progress, num_captures: int, expected_s: dict[str, float]) -> None:
        self._progress = progress
        self._expected_s = expected_s
        self._num_captures = num_captures
        self._num_done = num_captures - len(expected_s)
        self._left_s, self._done_s = sum(expected_s.values()), 0.0
        self._began_s = self._said_s = time.monotonic()
        self._task = progress.add_task("", total=self._num_captures, facts="", left="")

    def begin(self, plan: Plan) -> None:
        self._show(to_title(plan))

    def end(self, plan: Plan) -> None:
        expected_s = self._expected_s.get(str(plan.store))
        if expected_s is None:  # it was there before
            return
        self._num_done += 1
        self._done_s += expected_s
        self._left_s -= expected_s
        title = to_title(plan)
        self._show(title)
        now_s = time.monotonic()
        is_due = self._num_done == self._num_captures or now_s - self._said_s >= LINE_S
        if is_due and not console.is_terminal:
            self._said_s = now_s
            console.print(f"{self._num_done} of {self._num_captures} captures, {self._left()} left: {title}")

    def _show(self, title: str) -> None:
        self._progress.update(self._task, completed=self._num_done, facts=title, left=self._left())

    def _left(self) -> str:
        if not self._done_s:
            return "-:--:--"
        pace = (time.monotonic() - self._began_s) / self._done_s
        return str(timedelta(seconds=round(pace * self._left_s)))


@contextmanager
def _study_bar(num_captures: int, expected_s: dict[str, float]) -> Iterator[_StudyBar]:
    columns = (
        TextColumn("{task.completed} of {task.total} captures", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _StudyBar(progress, num_captures, expected_s)


def to_title(plan: Plan) -> str:
    """Returns a capture in a few characters: its store's name."""
    return str(plan.store).rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")


def _is_done(plan: Plan) -> bool:
    path = plan.store
    return store_exists(path) and not Store.open(path).todo()


def _print_plans(plans: Sequence[Plan], todo: Sequence[Plan], seconds: float) -> None:
    """Prints how many captures there are, and roughly what they take."""
    table, dataset = Table.grid(padding=(0, 2)), plans[0].dataset
    before = f", {len(plans) - len(todo)} of them there" if len(todo) < len(plans) else ""
    table.add_row("captures", f"{len(plans)}{before}")
    table.add_row("each", f"{plans[0].slots.num_sequences} sequences, {dataset.num_tokens} tokens")
    if todo:
        table.add_row("time", f"at least {to_duration(seconds)} on {todo[0].device}")
        table.add_row("disk", f"up to {to_size(sum(disk_bytes(plan) for plan in todo))}")
        table.add_row("memory", f"about {to_size(max(memory_bytes(plan) for plan in todo))}")
    console.print(table)


def to_duration(seconds: float) -> str:
    """Returns a duration as two digits and a unit."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _print_outcomes(outcomes: Sequence[Outcome], num_new: int, seconds: float) -> None:
    done = sum(outcome.complete for outcome in outcomes)
    before = f", {len(outcomes) - num_new} of them before" if num_new < len(outcomes) else ""
    console.print(f"{done} of {len(outcomes)} captures are complete{before}; this run took {seconds:.1f} s")
    if bad := sum(outcome.num_non_finite for outcome in outcomes):
        console.print(f"{bad} values are infinite or undefined; the tables leave them out")
    for outcome in outcomes:
        if outcome.failures:
            console.print(f"failed: {outcome.path}; the same command tries it again", style="bold red")
