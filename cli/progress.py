"""Progress of a capture on a screen: the plan before it starts, a bar while it runs, lines at the end.

All of it goes to stderr; what a command was asked to show (`tables.py`) goes to stdout.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from signal import SIGINT, SIGTERM

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from ..capture.engines.events import (
    Event,
    FilesRestored,
    RunBegan,
    SlowUnit,
    UnitDone,
    UnitFailed,
    WorkerJoined,
    WorkerLost,
    WorkerRefused,
)
from ..capture.plan import Plan
from ..capture.plan_cost import disk_bytes, memory_bytes
from ..capture.run import Outcome, run_capture
from .tables import make_console, to_size, to_tokens

console = make_console(stderr=True)
LINE_S = 10.0  # between lines where there is no bar


def print_plan(plan: Plan) -> None:
    """Prints what the capture will take: sequences, units, disk, memory."""
    d = plan.description
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "model",
        f"{plan.source.title}  {d.notation}, {d.block.norm} norms, {plan.dtype} on {plan.device}",
    )
    empty = plan.dataset.identity.num_empty_rows
    table.add_row(
        "data",
        f"{plan.slots.num_sequences} sequences, {plan.dataset.num_tokens} tokens"
        + (f"; {empty} empty rows get no slots" if empty else ""),
    )
    if beginning := plan.dataset.beginning:
        table.add_row("rows begin", to_tokens(beginning))
    table.add_row(
        "units",
        f"{plan.slots.num_units} of {plan.slots.unit_tokens} token slots, "
        f"{d.depth} block invocations a token",
    )
    table.add_row("quantities", ", ".join(plan.quantities))
    if plan.settings.measure.neurons:
        table.add_row("neurons", f"of {d.num_blocks} blocks are told from the weights when the store is made")
    table.add_row("disk", f"up to {to_size(disk_bytes(plan))} in {plan.store}")
    gaps = {
        None: "",
        "keep states": f"; keeps {to_size(plan.kept_bytes)} until the last recurrence",
        "run twice": f"; runs the loop twice, for keeping what it leaves would take "
        f"{to_size(plan.kept_bytes)}",
    }[plan.gap_method]
    table.add_row("memory", f"about {to_size(memory_bytes(plan))}{gaps}")
    console.print(table)


class UnitBar:
    """Counts units that end: one bar on a terminal, a line now and then elsewhere.

    Rates are over this run alone.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, facts="", left="")
        self._began_s = self._said_s = time.monotonic()
        self._num_units = self._num_before = self._num_done = self._num_said = 0
        self._num_tokens = self._num_bytes = self._num_failed = self._num_workers = 0

    def __call__(self, event: Event) -> None:
        match event:
            case RunBegan():
                self._began_s = self._said_s = time.monotonic()
                self._num_units, self._num_before = event.num_units, event.num_done
                self._num_done = self._num_said = event.num_done
            case UnitDone():
                self._num_done += 1
                self._num_tokens += event.receipt.num_tokens
                self._num_bytes += event.receipt.num_bytes
            case UnitFailed():
                self._num_failed += 1
                console.print(f"unit {event.unit} failed three times:\n{event.error}")
            case WorkerJoined() | WorkerLost():
                if self._num_done == self._num_before:
                    self._began_s = time.monotonic()  # models are loaded
                self._num_workers = event.num_workers
        if (line := _to_line(event)) is not None:
            console.print(line)
        self._show()

    def _show(self) -> None:
        facts = ", ".join(self._facts())
        self._progress.update(
            self._task, total=self._num_units, completed=self._num_done, facts=facts, left=self._left()
        )
        now_s = time.monotonic()
        num_new = self._num_done - self._num_said
        is_due = 10 * num_new >= self._num_units or (num_new and now_s - self._said_s >= LINE_S)
        if is_due and not console.is_terminal:
            self._said_s, self._num_said = now_s, self._num_done
            console.print(f"{self._num_done} of {self._num_units} units, {facts}, {self._left()} left")

    def _facts(self) -> list[str]:
        """Returns facts in few enough characters for 80 columns, bar and all."""
        rate = self._num_tokens / max(1e-9, time.monotonic() - self._began_s)
        facts = [
            f"{_short(self._num_tokens)} tokens",
            f"{_short(rate)}/s",
            f"{_short(self._num_bytes, ' ')}B",
        ]
        if self._num_workers > 1:
            facts.append(f"{_short(self._num_workers)} workers")
        if self._num_failed:
            facts.append(f"{_short(self._num_failed)} failed")
        return facts

    def _left(self) -> str:
        num_done = self._num_done - self._num_before
        if not num_done:
            return "-:--:--"
        seconds = (time.monotonic() - self._began_s) / num_done
        left = timedelta(seconds=round(seconds * (self._num_units - self._num_done - self._num_failed)))
        return f"{left.days}d {left.seconds // 3600}h" if left.days else str(left)


@contextmanager
def unit_bar() -> Iterator[UnitBar]:
    """Shows a run while it goes on."""
    columns = (
        MofNCompleteColumn(table_column=Column(no_wrap=True)),  # the bar gives way
        TextColumn("units"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[facts]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield UnitBar(progress)


def _to_line(event: Event) -> str | None:
    match event:
        case WorkerLost(worker=worker, where=where, why=why, unit=unit):
            during = "" if unit is None else f" in unit {unit}"
            return f"worker {worker} ({where}) is lost{during}: {why}; others get its units"
        case WorkerRefused(worker=worker, why=why):
            return f"worker {worker} could not be started: {why}"
        case SlowUnit(unit=unit, where=where, seconds=seconds, median_s=median_s):
            usual = "" if median_s is None else f", and units take {median_s:.1f} s"
            return f"unit {unit} takes {seconds:.0f} s on {where}{usual}: it is given out again"
        case FilesRestored(files=files):
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            return f"written again, as they were damaged or lost: {', '.join(files[:3])}{more}"
    return None


def _short(number: float, space: str = "") -> str:
    """Returns a number as three digits and a prefix: 12.3k."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{space}{prefix}"
        number /= 1000
    return f"{number:.3g}{space}T"


class Halt:
    """Handles Ctrl-C while a command captures: once, units in flight are finished and none is begun; twice,
    it stops at once, as it does while no unit can be in flight yet.

    SIGTERM is a Ctrl-C, as jobs are told with it that their time is over.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.may_be_in_flight = False

    def __enter__(self) -> "Halt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (SIGINT, SIGTERM)}
        else:  # only the main thread may, and it gets the signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.is_asked or not self.may_be_in_flight:
            raise KeyboardInterrupt
        self.is_asked = True
        # from a thread: whoever was interrupted may hold the console's lock
        text = "finishing the units in flight; Ctrl-C again stops at once"
        threading.Thread(target=console.print, args=(text,)).start()


def print_outcome(outcome: Outcome, seconds: float) -> None:
    """Prints one line of result, and one for anything that is not as it should be."""
    done = outcome.num_units - len(outcome.failures) - outcome.num_left
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
    """Runs a capture and prints the plan, the bar and the outcome.

    Raises:
        KeyboardInterrupt: it was told to stop, and units are left.
    """
    print_plan(plan)
    started_s = time.perf_counter()
    with Halt() as halt, unit_bar() as bar:

        def on_event(event: Event) -> None:
            halt.may_be_in_flight |= isinstance(event, WorkerJoined)
            bar(event)

        outcome = run_capture(plan, on_event, lambda: not halt.is_asked)
    print_outcome(outcome, time.perf_counter() - started_s)
    if outcome.num_left:
        raise KeyboardInterrupt
    return outcome
