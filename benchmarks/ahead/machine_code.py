"""Registers, memory and instructions that machine code takes, read from what the compiler wrote."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from triton import knobs
from triton.compiler import CompiledKernel

# bytes of shared memory that one program may take; Triton compiles what is over it without complaint
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# what decides speed, in PTX and in AMD's assembly: matrix products of a warp, of four, on tensor memory, on
# AMD's matrix cores; copies into shared memory that nobody waits for, by thread and of whole tiles
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma",
    "async copy": r"\bcp\.async\.c[ag]\.",
    "tile copy": r"\bcp\.async\.bulk\.tensor",
}
MATRIX = ("mma", "wgmma", "tcgen05", "mfma")

_USED = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
_USED_BY_AMD = re.compile(r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", re.M)
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_SASS_MATRIX = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Resources:
    """The resources of a GPU that compiled code takes."""

    registers: int  # of a thread
    spills: int  # bytes a thread keeps in memory for want of registers
    shared: int  # bytes of a program
    num_warps: int  # of a program; 32 threads each, on AMD 64
    # how often each of INSTRUCTIONS is in the code
    instructions: dict[str, int] = field(default_factory=dict)

    def faults(self, target: str) -> list[str]:
        """Reasons why this must not be launched on a target of SHARED_LIMIT; none if it may."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes a thread are spilled")
        if self.shared > SHARED_LIMIT[target]:
            found.append(f"{self.shared} bytes of shared memory, over {SHARED_LIMIT[target]}")
        return found

    def resident_warps(self, target: str) -> int:
        """Warps that one multiprocessor holds at once, as registers, shared memory and its slots allow."""
        if target == "gfx942":  # 512 registers a lane of each of four units, which share a program's warps
            by_registers = 4 * min(8, 512 // _up(self.registers, 8)) // self.num_warps
            by_memory = 65_536 // max(self.shared, 1)
            return self.num_warps * min(by_registers, by_memory)
        by_registers = 65_536 // (_up(self.registers, 8) * 32 * self.num_warps)
        by_memory = (SHARED_LIMIT[target] + 1024) // (self.shared + 1024)  # 1 KiB of each program's is taken
        return self.num_warps * min(by_registers, by_memory, 64 // self.num_warps, 32)


@dataclass(frozen=True)
class Code:
    """What NVIDIA's machine code does, instruction by instruction."""

    # instructions of the innermost loop with most matrix products, among equals of the shortest, which masks
    # nothing; 0 if no loop has any
    main_loop: int
    accesses: dict[str, int]  # LDG.128, STG.32, ...: loads from and stores to global memory, by width


def read_resources(compiled: CompiledKernel) -> Resources:
    """Reads what a kernel takes, from its binary (NVIDIA) or its assembly (AMD)."""
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    if "cubin" in compiled.asm:
        used = {name: int(n) for name, n in _USED.findall(_dump(compiled.asm["cubin"], "-res-usage"))}
        registers, spills = used["REG"], used["STACK"] + used["LOCAL"]
    else:
        used = {name: int(n) for name, n in _USED_BY_AMD.findall(assembly)}
        registers = used["vgpr_count"]
        spills = max(used["private_segment_fixed_size"], 4 * used["vgpr_spill_count"])
    found = {name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()}
    return Resources(
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        instructions={name: n for name, n in found.items() if n},
    )


@cache
def read_code(compiled: CompiledKernel) -> Code:
    """Reads what a kernel for NVIDIA does; half a second of disassembly."""
    text = _dump(compiled.asm["cubin"], "-sass")
    code = [(int(at, 16), name, rest) for at, name, rest in _SASS_LINE.findall(text)]
    loops = _innermost_loops(code)
    products = [sum(name.split(".")[0] in _SASS_MATRIX for _, name, _ in loop) for loop in loops]
    most = max(products, default=0)
    accesses: Counter[str] = Counter()
    for _, name, _ in code:
        kind, *modifiers = name.split(".")
        if kind in ("LDG", "STG"):
            width = next((m for m in modifiers if m in ("128", "64", "U16", "S16", "U8")), "32")
            accesses[f"{kind}.{width}"] += 1
    main_loops = (len(loop) for loop, n in zip(loops, products, strict=True) if n == most > 0)
    return Code(min(main_loops, default=0), dict(accesses))


def _innermost_loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """What stands between each backward branch and its target, where no other such pair lies inside; of each
    line its address, instruction and operands.
    """
    spans = []
    for at, name, rest in code:
        found = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if found and int(found[1], 16) < at:
            spans.append((int(found[1], 16), at))
    inner = [
        a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] and b[0] < b[1] for b in spans)
    ]
    return [[line for line in code if first <= line[0] <= last] for first, last in sorted(inner)]


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(knobs.nvidia.cuobjdump.path), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
