"""Kernels compiled for GPUs that are not there, and what their machine code takes.

A process under TRITON_INTERPRET=1 cannot compile.
"""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from ...kernels.gpu.tuned import TRITON, Entry
from .launches import Launch, launches
from .machine_code import MATRIX, Code, Resources, read_code, read_resources

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver:
    """A GPU as far as the compiler asks for one."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return self._target  # Triton keeps kernels by it

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


@dataclass(frozen=True)
class Compiled:
    """One launch of one row of the table on one target."""

    entry: Entry
    target: str
    launch: str  # its name
    resources: Resources
    code: Code | None  # read of rows that are tuned for an NVIDIA target

    @property
    def faults(self) -> list[str]:
        """Reasons why this must not be launched; none if it may."""
        found = self.resources.faults(self.target)
        multiplies_halves = self.entry.dtype == "half" and self.entry.kernel != "residual_norm"
        if multiplies_halves and not self.resources.instructions.keys() & MATRIX:
            found.append("products of half precision run outside the matrix units")
        return found

    def __str__(self) -> str:
        e = self.entry
        return f"{e.kernel} {e.width} {e.dtype}, {e.target} on {self.target}, {self.launch}"


def compile_rows(
    entries: Iterable[Entry], targets: Iterable[str] = TARGETS, processes: int = 2
) -> list[Compiled]:
    """Every launch of every row on every target that the row may be launched on, by this Triton."""
    rows = [
        (entry, target)
        for target in targets
        for entry in entries
        if entry.triton in (TRITON, "any") and entry.target in (target, "any")
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        done = pool.map(compile_row, *zip(*rows, strict=True), chunksize=1) if rows else []
        return [compiled for row in done for compiled in row]


def compile_row(entry: Entry, target: str) -> list[Compiled]:
    """Every launch of one row on one target."""
    found = []
    for name, launch in launches(entry).items():
        kernel = compile_launch(launch, target)
        code = read_code(kernel) if entry.target == target and target != "gfx942" else None
        found.append(Compiled(entry, target, name, read_resources(kernel), code))
    return found


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    """A launch compiled for one of TARGETS."""
    assert isinstance(launch.kernel, JITFunction), "under TRITON_INTERPRET=1 nothing can be compiled"
    with mock.patch.object(driver, "_active", _Driver(target)):
        compiled = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    assert isinstance(compiled, CompiledKernel)
    return compiled
