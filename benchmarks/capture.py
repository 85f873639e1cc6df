"""What a capture costs beside the model's own forward pass.

A forward pass on a CPU is bound by its matrix products, about 2 FLOP a weight and token; the statistics of
the residual read each block's output a few times out of the cache, and those of attention turn one fused pass
over the scores into a handful of elementwise ones, whose share grows with the sequence length. Three things
are timed on the same token batches, alternating within one process so that a busy machine slows all of them:
the forward pass without a tap and without logits; the same with every statistic measured; the whole unit,
measured, encoded, written and committed. Peak memory is of two processes of their own, one that only runs
forward passes and one that captures.

Last line: JSON.
"""

import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class CaptureBench:
    """Time and memory of a capture as ratios to the same model's forward pass without a tap."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = (
        "random:(30,0,0),width=576,heads=9"
    )
    """Directory or spec; the default has about the shape of SmolLM2-135M."""
    loop: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LASTxTIMES")] = None
    """Repeat a window of a feedforward model's layers: first-lastxtimes."""
    sequences: int = 32
    """How many sequences are captured."""
    length: int = 512
    """Tokens of each."""
    rounds: int = 3
    """Times that each unit is measured; medians are reported."""
    batch_tokens: int = 2048
    """Most tokens in one forward pass."""


def bench_capture(settings: CaptureBench) -> None:
    """Runs it and prints a table and a line of JSON."""
    import numpy as np

    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "ids.npy"
        generator = np.random.default_rng(0)
        np.save(data, generator.integers(0, 256, (settings.sequences, settings.length), dtype=np.int32))
        times = _timed(settings, data, Path(directory))
        peaks = {name: _peak_bytes(name, settings, data, Path(directory)) for name in ("plain", "capture")}
    plain_s = times["plain"]
    print(
        f"{settings.sequences} sequences of {settings.length} tokens, {settings.model}, loop {settings.loop}"
    )
    print(f"{'':24}{'seconds':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    for name, label in (
        ("plain", "forward"),
        ("measured", "forward, measured"),
        ("capture", "capture, committed"),
    ):
        memory = f"{peaks[name] / 2**20:10.0f}{peaks[name] / peaks['plain']:8.2f}" if name in peaks else ""
        print(f"{label:24}{times[name]:10.2f}{times[name] / plain_s:8.2f}{memory}")
    print(json.dumps(_record(settings, times, peaks)))


def _timed(settings: CaptureBench, data: Path, directory: Path) -> dict[str, float]:
    """Median seconds over rounds of all units, by way of running them."""
    from ..capture.worker import Worker

    seconds: dict[str, list[float]] = {"plain": [], "measured": [], "capture": []}
    for round_ in range(settings.rounds + 1):  # the first warms up
        store, source = _new_store(settings, data, directory / f"{round_}.zarr")
        worker = Worker(source, store)
        total = dict.fromkeys(seconds, 0.0)
        for unit in range(store.num_units):
            total["plain"] += _elapsed(worker.forward, unit)
            total["measured"] += _elapsed(worker.measure, unit)
            total["capture"] += _elapsed(worker.run, unit)
        if round_:
            for name, value in total.items():
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peak_bytes(name: str, settings: CaptureBench, data: Path, directory: Path) -> int:
    """Peak resident memory of a fresh process while it runs, the loaded model included; not ru_maxrss, which
    starts at the parent's.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run_and_measure, (name, settings, data, directory / f"{name}.zarr"))


def _run_and_measure(name: str, settings: CaptureBench, data: Path, path: Path) -> int:
    from ..capture.worker import Worker

    store, source = _new_store(settings, data, path)
    worker = Worker(source, store)
    # the peak so far is that of loading, which both share; this starts it anew (Linux)
    Path("/proc/self/clear_refs").write_text("5")
    for unit in range(store.num_units):
        worker.forward(unit) if name == "plain" else worker.run(unit)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _new_store(settings: CaptureBench, data: Path, path: Path):
    from ..capture.plan import make_plan
    from ..capture.run import prepare_store
    from ..capture.settings import CaptureSettings

    wanted = CaptureSettings(
        model=settings.model, data=data, store=path, loop=settings.loop, batch_tokens=settings.batch_tokens
    )
    plan = make_plan(wanted)
    return prepare_store(plan), plan.source


def _elapsed(run: Callable[[int], object], unit: int) -> float:
    started_s = time.perf_counter()
    run(unit)
    return time.perf_counter() - started_s


def _record(settings: CaptureBench, times: dict[str, float], peaks: dict[str, int]) -> dict[str, object]:
    import torch

    return {
        "benchmark": "capture",
        "settings": replace(settings, model=Path(settings.model).name).__dict__,
        "seconds": times,
        "peak_bytes": peaks,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
