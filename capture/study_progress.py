"""What a study of many captures tells a person: what all of it takes, and one bar for all of them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from .engines.events import Event, UnitFailed, WorkerJoined
from .initial_states import initial_state
from .models.tap import Packed
from .plan import Plan
from .progress import LINE_S, Halt, console
from .run import Outcome, RunBegan, run_capture
from .show import to_size
from .store.commit import Store
from .store.layout import store_exists


def run_all_with_progress(plans: Sequence[Plan]) -> list[Outcome]:
    """Captures one after another as a person watches them: what they take, one bar, a line at the end.

    Raises:
        KeyboardInterrupt: it was told to stop, and captures are left.
    """
    todo = [plan for plan in plans if not _is_done(plan)]
    _print_plans(plans, todo)
    started_s = time.monotonic()
    outcomes = []
    with Halt() as halt, _study_bar(plans, todo) as bar:

        def on_event(event: RunBegan | Event) -> None:
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
    """Counts captures; the time left goes by their block invocations times the size of a block."""

    def __init__(self, progress: Progress, plans: Sequence[Plan], todo: Sequence[Plan]) -> None:
        self._progress = progress
        self._todo = {str(plan.settings.store): to_work(plan) for plan in todo}
        self._num_captures = len(plans)
        self._num_done = self._num_said = len(plans) - len(todo)
        self._work_left, self._work_done = sum(self._todo.values()), 0.0
        self._began_s = self._said_s = time.monotonic()
        self._task = progress.add_task("", total=self._num_captures, facts="", left="")

    def begin(self, plan: Plan) -> None:
        self._show(to_title(plan))

    def end(self, plan: Plan) -> None:
        work = self._todo.get(str(plan.settings.store))
        if work is None:
            return
        self._num_done += 1
        self._work_done += work
        self._work_left -= work
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
        if not self._work_done:
            return "-:--:--"
        pace = (time.monotonic() - self._began_s) / self._work_done
        return str(timedelta(seconds=round(pace * self._work_left)))


@contextmanager
def _study_bar(plans: Sequence[Plan], todo: Sequence[Plan]) -> Iterator[_StudyBar]:
    columns = (
        TextColumn("{task.completed} of {task.total} captures", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _StudyBar(progress, plans, todo)


def to_work(plan: Plan) -> float:
    """Floating-point operations of all matrix products with weights; a measure of time between plans."""
    d = plan.description
    of_block = 2 * d.width * (2 * (d.num_heads + d.num_kv_heads) * d.head_width + 3 * d.mlp_width)
    return float(plan.dataset.num_tokens) * d.depth * of_block


def to_title(plan: Plan) -> str:
    """A capture in a few characters: its store's name."""
    return str(plan.settings.store).rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")


def _is_done(plan: Plan) -> bool:
    path = plan.settings.store
    return store_exists(path) and not Store.open(path).todo()


def _print_plans(plans: Sequence[Plan], todo: Sequence[Plan]) -> None:
    """How many captures there are, and roughly what they take."""
    table, dataset = Table.grid(padding=(0, 2)), plans[0].dataset
    before = f", {len(plans) - len(todo)} of them are there" if len(todo) < len(plans) else ""
    table.add_row(
        "captures", f"{len(plans)} of {len(dataset.rows)} sequences, {dataset.num_tokens} tokens{before}"
    )
    if todo:
        work = sum(map(to_work, todo))
        largest = max(todo, key=to_work)
        seconds = _time_one_recurrence(largest) * largest.description.recurrences * work / to_work(largest)
        table.add_row(
            "time", f"at least {to_duration(seconds)}, going by one recurrence of {to_title(largest)}"
        )
        table.add_row("work", f"{work / 1e12:.3g} TFLOP on {largest.device}")
        table.add_row("disk", f"up to {to_size(sum(plan.disk_bytes for plan in todo))}")
        table.add_row("memory", f"about {to_size(max(plan.memory_bytes for plan in todo))}")
    console.print(table)


@torch.inference_mode()
def _time_one_recurrence(plan: Plan) -> float:
    """Seconds that one recurrence over all data takes without being measured, the better of two."""
    d = plan.description.with_recurrences(1)
    model = plan.source.origin.load(d, plan.device, torch.float32)
    index, row = max(enumerate(plan.dataset.rows), key=lambda pair: len(pair[1]))
    ids_N = torch.as_tensor(row, dtype=torch.int64, device=plan.device)
    batch = Packed(ids_N, (len(row),))
    state_ND = initial_state(None, d, plan.settings.seed, [index], batch.lengths, None)
    best_s = float("inf")
    for _ in range(2):
        started_s = time.perf_counter()
        model(batch, initial_state_ND=state_ND).sum().item()  # waits for the device
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s * plan.dataset.num_tokens / len(row)


def to_duration(seconds: float) -> str:
    """Two digits and a unit."""
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
