"""Times on a GPU: medians of CUDA events over inputs that do not fit its cache, and what the machine itself
does in the same run.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Run = Callable[[int], object]  # takes the number of a set of inputs
_TERA = 1e12


@dataclass
class Timer:
    """Seconds of a call of each case, in turns.

    Before each turn the GPU is kept waiting until the calls are queued, so that what is timed is the GPU's
    work. On a CPU, where this only shows that the cases run, a call is timed once.
    """

    device: torch.device
    rounds: int = 20
    failures: dict[str, str] = field(default_factory=dict)
    """Cases that could not run, and why."""

    def __call__(self, cases: Mapping[str, Run], num_sets: int) -> dict[str, float]:
        queue_s = {}
        for name, run in cases.items():
            try:
                queue_s[name] = self._warm_up(run, num_sets)
            except Exception as error:  # an alternative that this machine lacks must not lose the others
                self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        if self.device.type == "cpu":
            return queue_s
        times: dict[str, list[float]] = {name: [] for name in queue_s}
        for _ in range(self.rounds):
            for name in queue_s:
                times[name].append(self._turn(cases[name], num_sets, queue_s[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def _warm_up(self, run: Run, num_sets: int) -> float:
        """Seconds that the calls of all sets take to be queued, compiled by then; on a CPU, to run."""
        if self.device.type == "cpu":
            started_s = time.perf_counter()
            run(0)
            return time.perf_counter() - started_s
        queue_s = 0.0
        for _ in range(3):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            for i in range(num_sets):
                run(i)
            queue_s = time.perf_counter() - started_s
        torch.cuda.synchronize()
        return queue_s

    def _turn(self, run: Run, num_sets: int, queue_s: float) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # cycles of at most 2 GHz
        torch.cuda._sleep(int(min(2 * queue_s, 0.05) * 2e9))
        start.record()
        for i in range(num_sets):
            run(i)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / num_sets


def num_sets(device: torch.device, num_bytes: int) -> int:
    """Sets of inputs of so many bytes that together are twice the GPU's cache, at least 2."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * cache // num_bytes))


def measure_anchors(timer: Timer, *, copied_bytes: int = 2**30, size: int = 8192) -> dict[str, float]:
    """What the device itself does: copying within its memory, and bfloat16 matrix products."""
    source = torch.randn(copied_bytes // 2, device=timer.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=timer.device, dtype=torch.bfloat16)
    times = timer({"copy": lambda i: target.copy_(source), "product": lambda i: a @ b}, 2)
    return {
        "copy_tb_per_s": 2 * source.nbytes / times["copy"] / _TERA,
        "bf16_product_tflop_per_s": 2 * size**3 / times["product"] / _TERA,
    }


def extra_cuda_bytes(run: Callable[[], object]) -> int:
    """Peak of allocated memory in a call beyond what it leaves allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del results
    return extra
