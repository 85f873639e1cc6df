"""The same tokens watched in transformers and run by our own model: do the stores agree, what does each cost.

Both run the same matrix products. Watching adds to the model's own attention a second pass over the scores,
where our own model's measuring attention replaces the first; both add a few passes over each block's output.
So a watched forward pass costs more over its plain one, by about one attention, whose share grows with the
sequence length. Logits are left out on both sides.

First each side makes a store of all rows, and the largest difference of every quantity is printed: of values
below 1 as it is, of others as a share of the value. Then plain passes and measured ones take turns, each
measured one between two plain ones, so that a busy machine slows both. transformers runs a row at a time, our
own model packs rows into batches as a capture does.

A table, then a line of JSON.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UnavailableError, UnfitError
from .bench_settings import WatchBench

_QUANTITIES = ("residual", "steps", "gaps", "attention")


def bench_watch(settings: WatchBench) -> None:
    """Runs it and prints a table and a line of JSON.

    Raises:
        UnavailableError: transformers is missing.
        ModelError, UnfitError: the model cannot be looped, or its rows fill more than a unit.
    """
    from ..capture.store.reading.reader import open_store
    from ..capture.watch.context import watch

    with tempfile.TemporaryDirectory() as directory:
        data = _write_rows(settings, Path(directory))
        module = _load_module(settings)
        worker, rows = _make_worker(settings, data, Path(directory))
        with watch(module, "layers.*", quantities=_QUANTITIES) as watched:
            _run_module(module, rows)
        worker.run(0)
        own = open_store(Path(directory) / "own.zarr").load()
        differences = compare(watched.dataset(), own)
        speed, ratios = _timed(settings, module, worker, rows)
    num_tokens = sum(map(len, rows))
    loop = f", layers {settings.loop}" if settings.loop else ""
    print(f"{len(rows)} rows, {num_tokens} tokens, {Path(settings.model).name}{loop}: {watched.notation}")
    for name, difference in differences.items():
        print(f"{name:20} differs by at most {difference:.1e}")
    for side, label in (("transformers", "watched"), ("own", "captured")):
        low, middle, high = min(ratios[side]), statistics.median(ratios[side]), max(ratios[side])
        print(
            f"{side:13} plain {speed[side]:.0f} tokens/s, {label} {middle:.2f} of its time "
            f"[{low:.2f} to {high:.2f}]"
        )
    print(json.dumps(_record(settings, num_tokens, differences, speed, ratios)))


def compare(watched: Any, own: Any) -> dict[str, float]:
    """The largest difference of every quantity, |a − b| / max(1, |b|).

    Raises:
        ValueError: the stores hold other tokens or depths, or a value where the other has none.
    """
    import numpy as np

    found = {}
    for name in (*own.coords, *own.data_vars):
        ours, theirs = own[name].values, watched[name].values
        if ours.shape != theirs.shape or not np.array_equal(np.isnan(ours), np.isnan(theirs)):
            raise ValueError(f"{name} has other values missing, or another shape, when watched")
        if name in own.coords and not np.array_equal(ours, theirs):
            raise ValueError(f"coordinate {name} differs between the two stores")
        if name in own.data_vars and np.isfinite(ours).any():
            found[str(name)] = float(np.nanmax(np.abs(theirs - ours) / np.maximum(1, np.abs(ours))))
    return found


def _write_rows(settings: WatchBench, directory: Path) -> Path:
    """The rows as a file of token ids, so that both sides read the same."""
    import numpy as np
    from safetensors.numpy import save_file

    from ..capture.data import read_dataset
    from ..capture.models.load import find_model
    from ..capture.tokenizer import model_tokenizer

    source = find_model(settings.model)
    if settings.data is None:
        high, shape = source.description.vocab_size, (settings.sequences, settings.length)
        rows = list(np.random.default_rng(0).integers(0, high, shape))
    else:
        tokenizer = model_tokenizer(source)
        rows = read_dataset(settings.data, tokenizer, field=settings.field, limit=settings.sequences).rows
    ids_ST = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for padded_T, row in zip(ids_ST, rows, strict=True):
        padded_T[: len(row)] = row
    path = directory / "rows.safetensors"
    save_file({"input_ids": ids_ST, "lengths": np.array([len(row) for row in rows])}, path)
    return path


def _load_module(settings: WatchBench) -> Any:
    """transformers' decoder without its head; a window is looped by naming its layers several times."""
    try:
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnavailableError("transformers is not installed; pip install 'looptap[test]'") from None
    import torch
    from torch import nn

    from ..capture.models.load import find_model

    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (ValueError, OSError) as error:  # what it raises for a directory that it cannot read
        raise UnfitError(f"transformers does not read {settings.model}: {error}") from error
    module: Any = model.get_decoder().eval()
    d = find_model(settings.model, settings.loop).description
    layers, end = list(module.layers), d.prelude + d.core
    window = layers[d.prelude : end] * d.recurrences
    module.layers = nn.ModuleList([*layers[: d.prelude], *window, *layers[end:]])
    module.config.num_hidden_layers = len(module.layers)
    return module


def _make_worker(settings: WatchBench, data: Path, directory: Path) -> tuple[Any, list[Any]]:
    """Our own model at work on a store of one unit, and the rows."""
    from ..capture.plan import make_plan
    from ..capture.run import prepare_store
    from ..capture.settings import CaptureSettings
    from .measuring import MeasuringWorker

    wanted = CaptureSettings.of(
        model=settings.model,
        data=data,
        store=directory / "own.zarr",
        loop=settings.loop,
        quantities=_QUANTITIES,
        dtype="float32",
        device="cpu",
    )
    plan = make_plan(wanted)
    rows = plan.dataset.rows
    if plan.slots.num_units > 1:
        raise UnfitError(
            f"{sum(map(len, rows))} tokens do not fit one unit of {plan.slots.unit_tokens} slots: give fewer "
            "--sequences"
        )
    return MeasuringWorker(plan.load_model(), prepare_store(plan)), rows


def _run_module(module: Any, rows: Sequence[Any]) -> None:
    import torch

    with torch.inference_mode():
        for row in rows:
            module(torch.from_numpy(row.astype("int64"))[None], use_cache=False)


def _timed(
    settings: WatchBench, module: Any, worker: Any, rows: Sequence[Any]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Plain tokens a second, and ratios of measured passes to the plain ones on either side."""
    from ..capture.watch.context import watch

    def run_watched() -> None:
        with watch(module, "layers.*", quantities=_QUANTITIES):
            _run_module(module, rows)

    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "transformers": (lambda: _run_module(module, rows), run_watched),
        "own": (lambda: worker.forward(0), lambda: worker.measure(0)),
    }
    plain: dict[str, list[float]] = {side: [] for side in sides}
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(settings.rounds):
        for side, (run, measure) in sides.items():
            before_s, measured_s, after_s = (_elapsed(part) for part in (run, measure, run))
            plain[side] += [before_s, after_s]
            ratios[side].append(2 * measured_s / (before_s + after_s))
    num_tokens = sum(map(len, rows))
    return {side: num_tokens / statistics.median(times) for side, times in plain.items()}, ratios


def _elapsed(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def _record(
    settings: WatchBench,
    num_tokens: int,
    differences: dict[str, float],
    speed: dict[str, float],
    ratios: dict[str, list[float]],
) -> dict[str, object]:
    from importlib.metadata import version

    import torch

    named = {**asdict(settings), "model": Path(settings.model).name}
    named["data"] = settings.data and settings.data.name
    return {
        "benchmark": "watch",
        "settings": named,
        "num_tokens": num_tokens,
        "largest_difference": differences,
        "plain_tokens_per_s": speed,
        "time_ratio": {side: statistics.median(values) for side, values in ratios.items()},
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
    }
