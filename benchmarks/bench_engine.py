"""What the engines cost and how soon they mend: goals R1 to R4, what a worker waits by number of workers, and
from the measured costs where 1,000 GPUs would saturate the driver, the ledger and the file system.

A unit costs its engine one message there and one back, a turn of the scheduler, and, where a worker waits for
the next unit, the time in between; with two units in flight that is hidden, so that what is left is the
driver's own CPU time. None of it grows with what a unit captures, as results do not travel.

Workers here sleep, or do nothing at all: this machine need not have as many cores as there are workers, only
the sleepers among them must wake in time. The Ray cluster is one of three nodes in this machine, and a node
is killed without notice.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import asdict

from .bench_settings import EngineBench
from .goals import Figure, print_figures

# the estimate's assumptions
GPUS = 1000
UNIT_S = 30.0  # of one unit on a GPU
UNIT_BYTES = 2 << 30  # of one that keeps states: 16,384 tokens, 32 depths, width 2048, bfloat16
UNIT_FILES = 24  # 20 arrays, an attempt, a ledger entry, their staging


def bench_engine(settings: EngineBench) -> None:
    """Runs it and prints what workers wait, the estimate, the table, and a line of JSON."""
    from . import engine_costs as costs

    seconds = settings.sleep_ms / 1000
    print("measuring processes", flush=True)
    process_ms, _ = costs.cost(costs.processes(1), settings.units)
    waits = {"processes": {n: costs.overhead(costs.processes(n), n, seconds) for n in settings.workers}}
    print("measuring actors", flush=True)
    cpus = max(settings.workers)
    with costs.three_nodes(cpus) as nodes:
        actor_ms, actor_cpu_ms = costs.cost(costs.actors(1), settings.units)
        # two actors stand for 1,000: it is the driver that is measured, with as many calls to wait for
        _, crowded_cpu_ms = costs.cost(costs.actors(2), max(4 * GPUS, settings.units), depth=GPUS)
        waits["actors"] = {n: costs.overhead(costs.actors(n), n, seconds) for n in settings.workers}
        print("killing nodes", flush=True)
        kills = [costs.kill_a_node(nodes, cpus) for _ in range(settings.repeats)]
    print("measuring the scheduler and the ledger", flush=True)
    scheduler_ms = costs.scheduler_cost(GPUS)
    commits_per_s = costs.commits_per_s(settings.directory)
    print(f"\nms that a worker waits between two units, which are sleeps of {settings.sleep_ms:g} ms")
    for name, of_number in waits.items():
        print(f"  {name:11}" + "".join(f"{n:3} workers {ms:5.2f}" for n, ms in of_number.items()))
    print(*_estimate(crowded_cpu_ms, scheduler_ms, commits_per_s), "", sep="\n")
    print_figures(
        "the engines",
        _figures(process_ms, actor_ms, actor_cpu_ms, kills),
        ("ray",),
        benchmark="engine",
        settings={**asdict(settings), "directory": settings.directory and str(settings.directory)},
        wait_ms=waits,
        driver_cpu_ms={"actor": actor_cpu_ms, "2000 in flight": crowded_cpu_ms, "scheduler": scheduler_ms},
        commits_per_s=commits_per_s,
        cores=os.cpu_count(),
    )


def _figures(
    process_ms: float, actor_ms: float, actor_cpu_ms: float, kills: list[tuple[float, bool]]
) -> list[Figure]:
    again_s = [seconds for seconds, _ in kills]
    return [
        Figure(
            name="R1",
            what="ms per unit without work in it, one actor",
            seen=actor_ms,
            must=5,
            stretch=1,
            better="lower",
            detail=f"{actor_cpu_ms:.2f} ms of it CPU time of the driver; a process {process_ms:.2f} ms",
        ),
        Figure(
            name="R2",
            what="s from a node's death until its first unit is given to another, the longest",
            seen=max(again_s),
            must=10,
            stretch=5,
            better="lower",
            detail=", ".join(f"{seconds:.1f}" for seconds in again_s),
        ),
        Figure(
            name="R3",
            what="share of runs that end with every unit done once, a node killed and none spare",
            seen=statistics.fmean(ended for _, ended in kills),
            must=1,
            better="higher",
            detail=f"{len(kills)} runs",
        ),
        Figure(
            name="R4",
            what="imports of ray by the local engine",
            seen=float(_imports_ray()),
            must=0,
            better="lower",
            detail="a capture in one process and one with a worker of its own",
        ),
    ]


def _imports_ray() -> bool:
    """Whether a fresh Python loads Ray."""
    code = """
import sys, tempfile
from pathlib import Path
from looptap.capture.plan import make_plan
from looptap.capture.run import run_capture
from looptap.capture.settings import CaptureSettings
with tempfile.TemporaryDirectory() as directory:
    data = Path(directory) / "a.txt"
    data.write_text("a loop")
    for workers in (None, 1):
        settings = CaptureSettings.of(
            model="random:(0,2x2,0),width=32,heads=2", data=data, store=Path(directory) / f"{workers}.zarr",
            device="cpu", workers=workers,
        )
        assert run_capture(make_plan(settings)).complete
print("ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()[-1] == "True"


def _estimate(crowded_ms: float, scheduler_ms: float, commits_per_s: float) -> list[str]:
    """Estimates where so many GPUs would saturate what they share, from what was measured here."""
    needed = GPUS / UNIT_S
    most = 1000 / (crowded_ms + scheduler_ms)
    states_per_s, files_per_s = needed * UNIT_BYTES / 1e9, needed * UNIT_FILES
    return [
        f"\nestimate for {GPUS:,} GPUs, each at a unit for {UNIT_S:g} s, so {needed:.0f} units/s",
        f"  driver       {crowded_ms:.2f} ms CPU a unit with {2 * GPUS:,} in flight, {scheduler_ms:.2f} ms "
        f"to schedule {GPUS:,} workers:",
        f"               {most:,.0f} units/s at most, enough for {most * UNIT_S:,.0f} GPUs; "
        f"{needed / most:.1%} busy",
        f"  ledger       {commits_per_s:,.0f} durable commits/s on this disk, eight at a time: enough for "
        f"{commits_per_s * UNIT_S:,.0f} GPUs",
        f"  file system  must take {files_per_s:,.0f} new files/s ({UNIT_FILES} a unit), and "
        f"{states_per_s:,.0f} GB/s where a unit keeps {UNIT_BYTES / 2**30:g} GiB of states",
    ]
