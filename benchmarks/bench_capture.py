"""What a capture costs beside the model's own forward pass.

A forward pass on a CPU is bound by its matrix products, about 2 FLOP a weight and token. The statistics of
the residual read each block's output a few times out of the cache; those of attention turn one fused pass
over the scores into a handful of elementwise ones, whose share grows with the sequence length.

Three things are timed on the same token batches: the forward pass without a tap and without logits; the same
with every statistic measured; the whole unit, measured, encoded, written and committed. They take turns unit
by unit within one process, and the figures are medians of each unit's ratio to the forward passes on either
side of it, so that a busy machine slows all three. Peak memory is of two processes of their own, one that
runs only forward passes and one that captures, from when the model is loaded.

A table, then a line of JSON.
"""

import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bench_settings import CaptureBench


def bench_capture(settings: CaptureBench) -> None:
    """Runs it and prints a table and a line of JSON."""
    import numpy as np

    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "ids.npy"
        generator = np.random.default_rng(0)
        np.save(data, generator.integers(0, 256, (settings.sequences, settings.length), dtype=np.int32))
        tokens_per_s, ratios = _timed(settings, data, Path(directory))
        peaks = {name: _peak_bytes(name, settings, data, Path(directory)) for name in ("plain", "capture")}
    loop = f", layers {settings.loop}" if settings.loop else ""
    print(f"{settings.sequences} sequences of {settings.length} tokens, {settings.model}{loop}")
    print(f"forward without a tap: {tokens_per_s:.0f} tokens/s, peak {peaks['plain'] / 2**20:.0f} MiB")
    for name, label in (("measured", "measured"), ("capture", "measured and committed")):
        low, middle, high = min(ratios[name]), statistics.median(ratios[name]), max(ratios[name])
        print(f"{label + ':':24}{middle:.2f} of its time [{low:.2f} to {high:.2f}]")
    print(f"{'peak memory:':24}{peaks['capture'] / peaks['plain']:.2f} of its memory")
    print(json.dumps(_record(settings, tokens_per_s, ratios, peaks)))


def _timed(settings: CaptureBench, data: Path, directory: Path) -> tuple[float, dict[str, list[float]]]:
    """Tokens a second of the forward pass, and each unit's ratios to it."""
    plain: list[float] = []
    ratios: dict[str, list[float]] = {"measured": [], "capture": []}
    for round_ in range(settings.rounds):
        worker, num_units = _make_worker(settings, data, directory / f"{round_}.zarr")
        worker.measure(0)  # warms up
        for unit in range(num_units):
            before_s = _elapsed(worker.forward, unit)
            measured_s = _elapsed(worker.measure, unit)
            between_s = _elapsed(worker.forward, unit)
            capture_s = _elapsed(worker.run, unit)
            after_s = _elapsed(worker.forward, unit)
            plain += [before_s, between_s, after_s]
            ratios["measured"].append(2 * measured_s / (before_s + between_s))
            ratios["capture"].append(2 * capture_s / (between_s + after_s))
    unit_tokens = settings.sequences * settings.length / (len(plain) / 3 / settings.rounds)
    return unit_tokens / statistics.median(plain), ratios


def _peak_bytes(name: str, settings: CaptureBench, data: Path, directory: Path) -> int:
    """Peak resident memory of a fresh process while it runs, the loaded model included; not ru_maxrss, which
    starts at the parent's.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run_and_measure, (name, settings, data, directory / f"{name}.zarr"))


def _run_and_measure(name: str, settings: CaptureBench, data: Path, path: Path) -> int:
    worker, num_units = _make_worker(settings, data, path)
    # the peak so far is that of loading, which both share; this starts it anew (Linux)
    Path("/proc/self/clear_refs").write_text("5")
    for unit in range(num_units):
        worker.forward(unit) if name == "plain" else worker.run(unit)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _make_worker(settings: CaptureBench, data: Path, path: Path) -> tuple[Any, int]:
    """A worker on a new store, and how many units it has."""
    from ..capture.plan import make_plan
    from ..capture.run import prepare_store
    from ..capture.settings import CaptureSettings
    from .measuring import MeasuringWorker

    wanted = CaptureSettings.of(
        model=settings.model, data=data, store=path, loop=settings.loop, batch_tokens=settings.batch_tokens
    )
    if settings.quantities:
        wanted = wanted.but(quantities=settings.quantities)
    plan = make_plan(wanted)
    store = prepare_store(plan)
    return MeasuringWorker(plan.load_model(), store), store.num_units


def _elapsed(run: Callable[[int], object], unit: int) -> float:
    started_s = time.perf_counter()
    run(unit)
    return time.perf_counter() - started_s


def _record(
    settings: CaptureBench, tokens_per_s: float, ratios: dict[str, list[float]], peaks: dict[str, int]
) -> dict[str, object]:
    import torch

    return {
        "benchmark": "capture",
        "settings": {**asdict(settings), "model": Path(settings.model).name},
        "plain_tokens_per_s": tokens_per_s,
        "time_ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "memory_ratio": peaks["capture"] / peaks["plain"],
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
