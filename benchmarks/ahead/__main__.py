"""Prints what every row of the kernels' settings takes on every GPU it is for, and why it must not be
launched.

`python -m looptap.benchmarks.ahead --kernel attention`; it compiles, and needs no GPU.
"""

import argparse
import sys

import triton

from ...kernels.gpu.tuned import read_table
from .compiled import compile_rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What the kernels take on every GPU.")
    parser.add_argument("--kernel", default="", help="only rows of kernels whose name begins so")
    arguments = parser.parse_args()
    compiled = compile_rows([e for e in read_table() if e.kernel.startswith(arguments.kernel)])
    for c in compiled:
        taken, loop = c.resources, f", main loop {c.code.main_loop}" if c.code and c.code.main_loop else ""
        warps = taken.resident_warps(c.target)
        print(
            f"{c!s:75} {taken.registers:3} registers {taken.shared:6} shared {warps:2} warps{loop}", *c.faults
        )
    num_faulty = sum(bool(c.faults) for c in compiled)
    print(f"triton {triton.__version__}: {len(compiled)} compiled, {num_faulty} not to launch")
    sys.exit(num_faulty > 0)


if __name__ == "__main__":
    main()
