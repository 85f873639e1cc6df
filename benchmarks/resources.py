"""What every row of the kernels' settings takes on every GPU it is for, compiled without one.

`python -m looptap.benchmarks.resources` prints it, with what forbids to launch a row; `--write` also puts the
numbers of this Triton into tests/kernels_compiled.json, to which the tests hold the next ones.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import triton

from ..kernels.gpu.compiled import Resources, compile_rows
from ..kernels.gpu.tuned import read_table

COMMITTED_PATH = Path(__file__).parents[1] / "tests" / "kernels_compiled.json"


def read_committed(path: Path = COMMITTED_PATH) -> dict[str, dict[str, dict[str, Resources]]]:
    """Triton version -> row -> variant -> what it took."""
    table = json.loads(path.read_text()) if path.exists() else {}
    return {
        version: {
            row: {name: Resources(**{**r, "loops": tuple(r["loops"])}) for name, r in variants.items()}
            for row, variants in rows.items()
        }
        for version, rows in table.items()
    }


def write_committed(
    rows: Mapping[str, Mapping[str, Resources]], version: str, path: Path = COMMITTED_PATH
) -> None:
    """Replaces one version's part; a variant a line, so that a change of one shows as one."""
    table = {**read_committed(path), version: rows}
    parts = []
    for name, part in sorted(table.items()):
        lines = [
            f"  {json.dumps(row)}: {{\n"
            + ",\n".join(f"   {json.dumps(v)}: {json.dumps(asdict(r))}" for v, r in sorted(variants.items()))
            + "\n  }"
            for row, variants in sorted(part.items())
        ]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the kernels take on every GPU.")
    parser.add_argument("--write", action="store_true", help=f"rewrite {COMMITTED_PATH.name}")
    parser.add_argument("--kernel", help="only rows of kernels whose name begins so; not with --write")
    arguments = parser.parse_args()
    if arguments.write and arguments.kernel:
        parser.error("--write takes all kernels")
    rows = compile_rows([e for e in read_table() if e.kernel.startswith(arguments.kernel or "")])
    num_faults = 0
    for row, variants in rows.items():
        for name, found in variants.items():
            faults = found.faults(row.rpartition(" ")[2])
            num_faults += bool(faults)
            loop = f", main loop {found.main_loop}" if found.main_loop else ""
            print(
                f"{row:55} {name:40} {found.registers:3} registers {found.shared:6} shared{loop}",
                *faults,
                sep="; ",
            )
    print(f"triton {triton.__version__}: {sum(map(len, rows.values()))} compiled, {num_faults} not to launch")
    if arguments.write:
        write_committed(rows, triton.__version__)
    sys.exit(num_faults > 0)


if __name__ == "__main__":
    main()
