"""What a capture tells a person: the plan before it starts, one bar while it runs, a few lines at the end.

All of it goes to stderr; what a command was asked to show (`show.py`) goes to stdout.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .engine import UnitDone, UnitFailed
from .plan import Plan
from .run import Outcome, prepare_store, run_capture
from .show import make_console, to_size

console = make_console(stderr=True)


def print_plan(plan: Plan) -> None:
    """What the capture will take: sequences, units, disk, memory."""
    d = plan.description
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "model",
        f"{plan.source.title}  {d.notation}, {d.block.norm} norms, {plan.dtype} on {plan.device}",
    )
    empty = plan.dataset.identity["num_empty_rows"]
    table.add_row(
        "data",
        f"{plan.slots.num_sequences} sequences, {plan.dataset.num_tokens} tokens"
        + (f"; {empty} empty rows get no slots" if empty else ""),
    )
    table.add_row(
        "units",
        f"{plan.slots.num_units} of {plan.slots.unit_tokens} token slots, "
        f"{d.depth} block invocations a token",
    )
    table.add_row("quantities", ", ".join(plan.quantities))
    table.add_row("disk", f"up to {to_size(plan.disk_bytes)} in {plan.settings.store}")
    gaps = {
        None: "",
        "keep states": f"; keeps {to_size(plan.kept_bytes)} until the last recurrence",
        "run twice": f"; runs the loop twice, for keeping what it leaves would take "
        f"{to_size(plan.kept_bytes)}",
    }[plan.gap_method]
    table.add_row("memory", f"about {to_size(plan.memory_bytes)}{gaps}")
    console.print(table)


@contextmanager
def unit_bar(plan: Plan, num_done: int) -> Iterator["UnitBar"]:
    """A bar on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("capture"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("units"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("capture", total=plan.slots.num_units, completed=num_done, rate="")
        yield UnitBar(progress, task)


class UnitBar:
    """Counts what ends; its rate is over this run alone."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._started_s = time.perf_counter()
        self._num_tokens = 0

    def __call__(self, event: UnitDone | UnitFailed) -> None:
        if isinstance(event, UnitFailed):
            console.print(f"unit {event.unit} failed three times:\n{event.error}")
            return
        self._num_tokens += event.entry["num_tokens"]
        rate = self._num_tokens / (time.perf_counter() - self._started_s)
        self._progress.update(self._task, advance=1, rate=f"{rate:.0f} tokens/s")


def print_outcome(outcome: Outcome, seconds: float) -> None:
    """One line of result, one for anything that is not as it should be."""
    done = outcome.num_units - len(outcome.failures)
    before = f", {outcome.num_resumed} of them before" if outcome.num_resumed else ""
    console.print(
        f"{done} of {outcome.num_units} units are in {outcome.path}{before}; this run took {seconds:.1f} s"
    )
    if outcome.num_non_finite:
        console.print(
            f"{outcome.num_non_finite} values are infinite or undefined; "
            "`looptap analyze` says at which depths"
        )
    if outcome.failures:
        units = ", ".join(str(failure.unit) for failure in outcome.failures)
        console.print(f"failed: units {units}; the same command tries them again", style="bold red")


def run_with_progress(plan: Plan) -> Outcome:
    """A capture as a person watches it: the plan, the bar, the outcome."""
    print_plan(plan)
    num_done = len(prepare_store(plan).done())
    started_s = time.perf_counter()
    with unit_bar(plan, num_done) as bar:
        outcome = run_capture(plan, bar)
    print_outcome(outcome, time.perf_counter() - started_s)
    return outcome
