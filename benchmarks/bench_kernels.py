"""Every kernel beside what a user would call instead, as ratios in one run.

On a GPU times are of CUDA events over buffers that do not fit its cache, and are also held to the copy
bandwidth and matrix throughput measured in the same run (`kernels_gpu.py`); on a CPU see `kernels_cpu.py`.

A table, the goals, then a line of JSON.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path

from ..errors import UnavailableError
from .bench_settings import KernelsBench
from .timing import table


def bench_kernels(settings: KernelsBench) -> None:
    """Runs it and prints a table, the goals and a line of JSON.

    Raises:
        UnavailableError: a GPU was asked for and there is none.
    """
    import torch

    on_gpu = torch.cuda.is_available() if settings.device == "auto" else settings.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UnavailableError("no GPU was found that this PyTorch can use; run with --device cpu")
    if on_gpu:
        from .kernels_gpu import bench_gpu

        anchors, rows, goals = bench_gpu(settings.rounds)
        device = torch.cuda.get_device_name()
    else:
        from .kernels_cpu import bench_cpu

        rows, goals = bench_cpu(settings.model, settings.lengths, settings.rounds)
        anchors, device = {}, f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    for line in (*table(rows), *map(str, goals)):
        print(line)
    record = {
        "benchmark": "kernels",
        "settings": {**asdict(settings), "model": Path(settings.model).name},
        "anchors": anchors,
        "rows": [asdict(row) for row in rows],
        "goals": [goal.to_json() for goal in goals],
        "device": device,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    print(json.dumps(record))
