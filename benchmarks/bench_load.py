"""What loading a checkpoint takes beside the model itself: host memory and time.

A model's own bytes must be somewhere; what counts is what comes on top. Reading a shard whole costs the
shard, mapping it costs as much of it as was touched, since mapped pages count as the process's own until the
file is closed. looptap reads through one small buffer, checks each piece and converts it straight into the
model's memory, so the excess should be a few MiB at any size.

The alternative is what safetensors offers: every shard loaded as a dictionary, then copied into the model.

A synthetic checkpoint is written in shards, and loaded both ways by processes of their own, in the dtype it
is stored in and in the other one. Measured is the peak resident memory (VmHWM, set back by clear_refs; Linux)
while the weights are loaded, less the bytes of the model, and less what was resident before: with everything
imported and a checkpoint of 1 MB loaded, as the first load of any size pulls in 45 MB of torch's code. Mapped
files count in it as far as they were touched; what the kernel caches of files that are read does not. Both
ways find the files in that cache.

A table, then a line of JSON.
"""

import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bench_settings import LoadBench

_SMALL = 64  # width of a checkpoint of 1 MB
_DTYPES = ("float32", "bfloat16")
_WAYS = ("looptap", "safetensors")


def bench_load(settings: LoadBench) -> None:
    """Runs it and prints a table and a line of JSON."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        write_checkpoint(path, settings)
        sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
        dtypes = sorted(_DTYPES, key=lambda dtype: dtype != settings.stored)
        loads = [measure_load(path, dtype, way) for dtype in dtypes for way in _WAYS]
    print(f"{settings.family}, {sum(sizes) / 1e6:.0f} MB of {settings.stored} in {len(sizes)} shards")
    print(f"{'dtype':10}{'way':13}{'model':>9}{'beyond it':>12}{'largest shard':>15}{'seconds':>10}")
    for found in loads:
        found["shard_ratio"] = found["beyond_bytes"] / max(sizes)
        print(
            f"{found['dtype']:10}{found['way']:13}{found['model_bytes'] / 1e6:>6.0f} MB"
            f"{found['beyond_bytes'] / 1e6:>9.1f} MB{found['shard_ratio']:>9.2f} times"
            f"{found['seconds']:>10.2f}"
        )
    print(json.dumps(_record(settings, sizes, loads)))


def write_checkpoint(path: Path, settings: LoadBench, width: int = 512) -> None:
    """A sound checkpoint of random weights, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    from ..capture.models.config import Config
    from ..capture.models.families import FAMILIES

    path.mkdir()
    config = _config(settings, width)
    (path / "config.json").write_text(json.dumps(config))
    family = FAMILIES[settings.family]
    sources = family.sources(family.describe(Config(path / "config.json", config), ()))
    generator, dtype, weight_map = torch.Generator().manual_seed(0), getattr(torch, settings.stored), {}
    for number, part in enumerate(_shares(sources, settings.shards)):
        tensors = {s.tensor: torch.randn(s.shape, generator=generator).mul_(0.02).to(dtype) for s in part}
        name = f"model-{number + 1:05}-of-{settings.shards:05}.safetensors"
        save_file(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure_load(path: Path, dtype: str, way: str = "looptap") -> dict[str, Any]:
    """Bytes of the model and peak bytes beyond it, and seconds, of one load in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load_and_measure, (path, dtype, way))


def _load_and_measure(path: Path, dtype: str, way: str) -> dict[str, Any]:
    from ..capture.models.load import find_model

    load = _load if way == "looptap" else _load_shards
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory) / "small"
        write_checkpoint(small, LoadBench(megabytes=1, shards=1), _SMALL)
        load(find_model(str(small)), dtype)
    source = find_model(str(path))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started_s = time.perf_counter()
    model = load(source, dtype)
    seconds = time.perf_counter() - started_s
    model_bytes = sum(p.nbytes for p in model.parameters())
    return {
        "dtype": dtype,
        "way": way,
        "model_bytes": model_bytes,
        "beyond_bytes": _resident("VmHWM") - before - model_bytes,
        "seconds": seconds,
    }


def _load(source: Any, dtype: str) -> Any:
    return source.load(dtype=dtype)


def _load_shards(source: Any, dtype: str) -> Any:
    """Every shard as a dictionary of tensors, then all of them into the model; nothing is checked."""
    import torch
    from safetensors.torch import load_file

    from ..capture.models.model import LoopedModel

    tensors = {}
    for path in sorted(source.origin.path.glob("*.safetensors")):
        tensors |= load_file(path)
    with torch.device("meta"):
        model = LoopedModel(source.description).to(getattr(torch, dtype))
    model = model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    for s in source.origin.sources:
        rows = parameters[s.parameter].flatten(1) if len(s.shape) > 1 else parameters[s.parameter]
        rows[s.first_row : s.first_row + s.shape[0]].copy_(tensors[s.tensor])
    return model


def _resident(field: str) -> int:
    """Returns the resident bytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def _config(settings: LoadBench, width: int) -> dict[str, Any]:
    """Fields of a model whose files are about as large as asked for."""
    mlp, vocabulary = 11 * width // 4, 16 * width
    layer = 4 * width**2 + 3 * width * mlp
    wanted = settings.megabytes * 1_000_000 / {"float32": 4, "bfloat16": 2}[settings.stored]
    return {
        "model_type": settings.family,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": max(1, round((wanted - 2 * vocabulary * width) / layer)),
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "total_ut_steps": 4,
    }


def _shares(sources: list[Any], num_shards: int) -> Iterator[list[Any]]:
    """Neighbouring tensors, in shards of about the same number of elements."""
    from math import prod

    sizes = [prod(source.shape) for source in sources]
    total, done, part = sum(sizes), 0, []
    shard = 1
    for source, size in zip(sources, sizes, strict=True):
        part.append(source)
        done += size
        if done >= total * shard / num_shards:
            yield part
            part, shard = [], shard + 1


def _record(settings: LoadBench, sizes: list[int], loads: list[dict[str, Any]]) -> dict[str, object]:
    import torch

    return {
        "benchmark": "load",
        "settings": asdict(settings),
        "largest_shard_bytes": max(sizes),
        "loads": loads,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
