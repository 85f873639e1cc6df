"""What is shown while a capture runs: one bar that fits 80 columns, or lines now and then."""

import io
import re
import signal
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from looptap.capture.engines.events import (
    Receipt,
    RunBegan,
    SlowUnit,
    UnitDone,
    UnitFailed,
    WorkerJoined,
    WorkerLost,
    WorkerRefused,
)
from looptap.cli import progress


@pytest.fixture
def console(monkeypatch):
    """A console of 80 columns, a terminal or not, and a clock that the test moves."""

    def make(is_terminal: bool) -> io.StringIO:
        out = io.StringIO()
        made = Console(file=out, width=80, force_terminal=is_terminal, highlight=False, markup=False)
        monkeypatch.setattr(progress, "console", made)
        return out

    return make


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_bar_fits_a_terminal_with_all_it_can_have_to_say(console, clock):
    out = console(True)
    with progress.unit_bar() as bar:
        bar(RunBegan(150_000, 99_000))
        bar(WorkerJoined(0, "a", 1000))
        clock[0] += 3600
        bar(UnitFailed(3, "why"))
        for unit in range(20):
            bar(UnitDone(unit, Receipt(num_tokens=65_536, num_bytes=123_456_789_012)))
    shown = Text.from_ansi(re.sub(r"\x1b\[\??\d*[A-KhlJ]", "", out.getvalue())).plain
    lines = [line for line in re.split("[\r\n]", shown) if " units " in line]
    assert lines and max(map(len, lines)) <= 80
    for part in ("99020/150000", "1.31M tokens", "364/s", "2.47 TB", "1k workers", "1 failed"):
        assert part in lines[-1], lines[-1]
    assert "…" not in lines[-1]
    # 180 s a unit and 50,979 units left
    assert lines[-1].rstrip().endswith("106d 4h")


def test_lines_come_with_every_tenth_or_after_ten_seconds(console, clock):
    out = console(False)
    with progress.unit_bar() as bar:
        bar(RunBegan(1000, 500))
        bar(WorkerJoined(0, "a", 1))
        for unit in range(500, 1000):
            clock[0] += 0.01 if unit < 900 else 3
            bar(UnitDone(unit, Receipt(num_tokens=10, num_bytes=1000)))
    said = out.getvalue().splitlines()
    assert [line.split(" of ")[0] for line in said[:4]] == ["600", "700", "800", "900"]
    assert said[0].startswith("600 of 1000 units, 1k tokens, 1k/s, 100 kB, 0:00:04 left")
    assert [line.split(" of ")[0] for line in said[4:7]] == ["904", "908", "912"]
    assert len(said) == 4 + 25


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            WorkerLost(2, "host, process 7", "exit -9", 17, 1),
            "worker 2 (host, process 7) is lost in unit 17: exit -9; others get its units",
        ),
        (
            WorkerLost(2, "host", "exit -9", None, 1),
            "worker 2 (host) is lost: exit -9; others get its units",
        ),
        (WorkerRefused(0, "no model"), "worker 0 could not be started: no model"),
        (
            SlowUnit(4, "host", 99.6, 3.21),
            "unit 4 takes 100 s on host, and units take 3.2 s: it is given out again",
        ),
        (SlowUnit(4, "host", 601, None), "unit 4 takes 601 s on host: it is given out again"),
        (UnitFailed(4, "Traceback: no"), "unit 4 failed three times:\nTraceback: no"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_is_said_in_a_line(console, clock, event, line):
    out = console(False)
    with progress.unit_bar() as bar:
        bar(RunBegan(9, 0))
        bar(event)
    assert out.getvalue() == line + "\n"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999.4, "999"), (999.5, "1k"), (12_345, "12.3k"), (2e15, "2e+03T")]
)
def test_three_digits(number, text):
    assert progress._short(number) == text


def test_a_second_signal_stops_and_handlers_are_put_back(console):
    out = console(False)
    before, threads = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    with progress.Halt() as halt:
        with pytest.raises(KeyboardInterrupt):  # nothing can be in flight yet
            signal.raise_signal(signal.SIGTERM)
        assert not halt.is_asked
        halt.may_be_in_flight = True
        signal.raise_signal(signal.SIGTERM)
        assert halt.is_asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    for thread in set(threading.enumerate()) - threads:  # the one that prints
        thread.join(10)
    assert out.getvalue() == "finishing the units in flight; Ctrl-C again stops at once\n"


def test_other_threads_leave_signals_alone(console):
    console(False)
    seen = []

    def enter():
        with progress.Halt() as halt:
            seen.append(halt.is_asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
