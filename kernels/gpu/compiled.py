"""Kernels compiled for GPUs that are not there, and what the machine code takes: registers, stack, shared
memory, instructions of the loops.

Tests hold these numbers to a committed table, and tuning leaves out candidates that spill. A process under
TRITON_INTERPRET=1 cannot compile.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .tuned import TRITON, Entry

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may take; Triton compiles what is over it without complaint
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_HALF_DOT = re.compile(r"tt\.dot(?:_scaled)? .*?: tensor<[\dx]+x(?:bf16|f16)")
_MATRIX = ("HGMMA", "UTCHMMA", "HMMA", "UTCQMMA")


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel, as its launcher would."""

    name: str
    kernel: Any
    types: Mapping[str, str]  # argument -> "*bf16", "i32", "fp32", "tensordesc<bf16[64,128]>"
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16, as strides are; pointers always are


@dataclass(frozen=True)
class Resources:
    """What compiled code takes."""

    registers: int  # of a thread
    spills: int  # bytes a thread keeps in memory for want of registers
    shared: int  # bytes of a program
    loops: tuple[int, ...] = ()  # instructions of every innermost loop, in the code's order; NVIDIA alone
    # of the innermost loop with most matrix products, among equals the shortest, which masks nothing
    main_loop: int = 0
    half_dots: int = 0  # products of bfloat16 or float16 tiles in the source
    counts: dict[str, int] = field(default_factory=dict)  # LDG.128, STG.128, matrix, ... over the whole code

    def faults(self, target: str) -> list[str]:
        """What forbids to launch this."""
        found = []
        if self.spills or self.counts.get("LDL") or self.counts.get("STL"):
            found.append(f"{self.spills} bytes a thread are spilled")
        if self.shared > SHARED_LIMIT[target]:
            found.append(f"{self.shared} bytes of shared memory, over {SHARED_LIMIT[target]}")
        if self.half_dots and not self.counts.get("matrix"):
            found.append("products of half precision run outside the matrix units")
        return found


@cache
def find_modules() -> dict[str, ModuleType]:
    """The module of this folder that launches each of the table's kernels."""
    names = (path.stem for path in sorted(Path(__file__).parent.glob("*.py")))
    modules = [import_module(f".{name}", __package__) for name in names if name not in ("compiled", "tuned")]
    return {kernel: module for module in modules for kernel in getattr(module, "KERNELS", ())}


def compile_rows(
    entries: Iterable[Entry], targets: Iterable[str] = TARGETS, processes: int = 2
) -> dict[str, dict[str, Resources]]:
    """What every variant of every row takes on every target that the row may be launched on, by this Triton.

    Returns:
        "kernel width dtype row's target -> compiled target" -> variant's name -> Resources; a row for one
        Triton has it behind its target
    """
    rows = [
        (entry, target)
        for target in targets
        for entry in entries
        if entry.triton in (TRITON, "any") and entry.target in (target, "any")
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        done = list(pool.map(compile_row, *zip(*rows, strict=True), chunksize=1)) if rows else []
    return {row_name(*row): resources for row, resources in zip(rows, done, strict=True)}


def compile_row(entry: Entry, target: str) -> dict[str, Resources]:
    """What every variant of one row takes on one target."""
    variants = find_modules()[entry.kernel].variants(entry, target)
    return {variant.name: compile_for(variant, target) for variant in variants}


def row_name(entry: Entry, target: str) -> str:
    own = entry.target if entry.triton == "any" else f"{entry.target}/{entry.triton}"
    return f"{entry.kernel} {entry.width} {entry.dtype} {own} -> {target}"


def compile_for(variant: Variant, target: str) -> Resources:
    """Compiles for one of TARGETS, with the options of a launch."""
    signature, attributes = {}, {}
    for index, name in enumerate(variant.kernel.arg_names):
        constant = name in variant.constants
        signature[name] = "constexpr" if constant else variant.types[name]
        if not constant and (signature[name][0] == "*" or name in variant.divisible):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=attributes
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    dots = len(_HALF_DOT.findall(compiled.asm["ttir"]))
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared, dots)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared, dots)


def _read_cubin(cubin: bytes, shared: int, half_dots: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    taken = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    code = [(int(at, 16), op, rest) for at, op, rest in _INSTRUCTION.findall(sass)]
    loops = _innermost_loops(code)
    products = [_counts(loop).get("matrix", 0) for loop in loops]
    most = max(products, default=0)
    main_loop = min((len(loop) for loop, n in zip(loops, products, strict=True) if n == most > 0), default=0)
    return Resources(
        registers=taken["REG"],
        spills=taken["STACK"],
        shared=shared,
        loops=tuple(map(len, loops)),
        main_loop=main_loop,
        half_dots=half_dots,
        counts=_counts(code),
    )


def _innermost_loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """What stands between each backward branch and its target, where no other such pair lies inside."""
    spans = []
    for at, op, rest in code:
        found = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if found and int(found[1], 16) < at:
            spans.append((int(found[1], 16), at))
    inner = [
        a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] and b[0] < b[1] for b in spans)
    ]
    return [[line for line in code if first <= line[0] <= last] for first, last in sorted(inner)]


def _counts(code: list[tuple[int, str, str]]) -> dict[str, int]:
    """How often what decides speed occurs: memory accesses by width, local memory, matrix products, exp2."""
    counts: dict[str, int] = {}
    for _, op, _ in code:
        kind, *modifiers = op.split(".")
        if kind in ("LDG", "STG"):
            width = next((m for m in modifiers if m in ("128", "64", "U16", "S16", "U8")), "32")
            name = f"{kind}.{width}"
        elif kind in _MATRIX:
            name = "matrix"
        elif kind in ("LDL", "STL") or (kind, *modifiers)[:2] == ("MUFU", "EX2"):
            name = kind
        else:
            continue
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _read_amdgcn(text: str, shared: int, half_dots: int) -> Resources:
    taken = {
        name: int(n)
        for name, n in re.findall(
            r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text, re.M
        )
    }
    spills = max(taken["private_segment_fixed_size"], 4 * taken["vgpr_spill_count"])
    counts = {"matrix": n} if (n := len(re.findall(r"^\s*v_mfma", text, re.M))) else {}
    return Resources(taken["vgpr_count"], spills, shared, half_dots=half_dots, counts=counts)


def _cuobjdump(*arguments: str) -> str:
    tool = Path(knobs.nvidia.cuobjdump.path)
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
