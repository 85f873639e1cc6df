"""The steps of `make gpu`, each in a process of its own, since one fault on a GPU spoils its process.

`python -m looptap.benchmarks.gpu_steps STEP RESULT`; the result is a JSON file. With `--device cpu` a step
runs small and without what needs a GPU, to show that it would run.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .gpu_checks import check_compiled, check_graphs, check_repeats, make_calls
from .kernels_gpu import GROUPS, TINY, Found, Sizes
from .model_gpu import TINY_MODEL, ModelSizes, bench_model
from .timing import table
from .timing_gpu import Timer

_DTYPES = (torch.bfloat16, torch.float32)
# rows of the residual for the count of bytes: what the cache still holds at the end must not matter
COUNTED_ROWS = 131_072
COUNTED_WIDTH = 2048


def repeats(device: torch.device) -> dict[str, Any]:
    """20 repeats of every operation are the same to the bit."""
    times = 2 if device.type == "cpu" else 20
    return _checked(device, lambda calls: check_repeats(calls, times))


def compiled(device: torch.device) -> dict[str, Any]:
    """torch.compile takes every operation whole and changes nothing."""
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    return _checked(device, lambda calls: check_compiled(calls, backend))


def graphs(device: torch.device) -> dict[str, Any]:
    """CUDA graphs replay every operation to the bit."""
    return _checked(device, lambda calls: {} if device.type == "cpu" else check_graphs(calls))


def calls(device: torch.device) -> dict[str, Any]:
    """Every operation once, for a tool that watches."""

    def run(operations: dict[str, Any]) -> dict[str, str]:
        for call in operations.values():
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {}

    return _checked(device, run)


def norms_once(device: torch.device) -> dict[str, Any]:
    """The residual norm plain, and with a previous state, once each, for a tool that counts bytes."""
    from ..kernels.residual_norm import residual_norm, residual_norm_statistics

    N, D = (8, 64) if device.type == "cpu" else (COUNTED_ROWS, COUNTED_WIDTH)
    x, branch, previous = torch.randn(3, N, D, device=device, dtype=torch.bfloat16).unbind()
    weight = torch.rand(D, device=device, dtype=torch.bfloat16)
    residual_norm(x, branch, eps=1e-6, next_weight_D=weight)
    residual_norm_statistics(x, branch, eps=1e-6, next_weight_D=weight, previous_ND=previous)
    return {"expected_bytes": [8 * N * D, 10 * N * D]}


def norms(device: torch.device) -> dict[str, Any]:
    return _measured("norms", device)


def attention(device: torch.device) -> dict[str, Any]:
    return _measured("attention", device)


def pairs(device: torch.device) -> dict[str, Any]:
    return _measured("pairs", device)


def model(device: torch.device) -> dict[str, Any]:
    sizes = TINY_MODEL if device.type == "cpu" else ModelSizes()
    return _to_json(bench_model(Timer(device, rounds=10), sizes), device)


STEPS: tuple[Callable[[torch.device], dict[str, Any]], ...] = (
    repeats,
    compiled,
    graphs,
    calls,
    norms_once,
    norms,
    attention,
    pairs,
    model,
)


def _checked(device: torch.device, check: Callable[[dict[str, Any]], dict[str, str]]) -> dict[str, Any]:
    faults, names = {}, []
    for dtype in _DTYPES:
        operations = make_calls(device, dtype)
        names = list(operations)
        faults |= {f"{name}, {dtype}": fault for name, fault in check(operations).items()}
    return {"operations": names, "faults": faults}


def _measured(group: str, device: torch.device) -> dict[str, Any]:
    return _to_json(GROUPS[group](Timer(device), TINY if device.type == "cpu" else Sizes()), device)


def _to_json(found: Found, device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":  # no figure of these sizes says anything
        return {"cases": [row.case for row in found.rows], "goal_names": [goal.name for goal in found.goals]}
    for line in (*table(found.rows), *map(str, found.goals)):
        print(line)
    for case, why in found.failures.items():
        print(f"{case} could not run: {why}")
    return {
        "anchors": found.anchors,
        "rows": [asdict(row) for row in found.rows],
        "goals": [goal.to_json() for goal in found.goals],
        "failures": found.failures,
    }


def main() -> None:
    by_name = {step.__name__: step for step in STEPS}
    parser = argparse.ArgumentParser(description="One step of make gpu.")
    parser.add_argument("step", choices=list(by_name))
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    result = by_name[arguments.step](torch.device(arguments.device))
    arguments.result.write_text(json.dumps(without_nan(result), allow_nan=False))


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
