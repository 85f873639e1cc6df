"""Runs the quick tests with the oldest and the newest torch and zarr of pyproject.toml, on each Python.

    python tests/matrix.py PYTHON...

Each pair has an environment of its own in build/matrix. What cannot run is named, and the exit code is 1.
This file needs nothing but the standard library.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "zarr")
QUICK = ("-q", "-m", "not slow and not apart and not full", "--ignore=tests/ahead")


def oldest(requirements: list[str]) -> Iterator[str]:
    """The first release that each requirement of LIBRARIES allows."""
    for name in LIBRARIES:
        (found,) = (match for line in requirements if (match := re.match(rf"{name}>=([\d.]+)", line)))
        yield f"{name}=={found[1]}.*" if found[1].count(".") == 1 else f"{name}=={found[1]}"


def newest(requirements: list[str]) -> Iterator[str]:
    """The requirements themselves: pip takes the newest release that they allow on a Python."""
    for name in LIBRARIES:
        yield from (line for line in requirements if re.match(rf"{name}[<>=]", line))


def run_cell(python: str, name: str, pins: list[str]) -> str:
    """Installs and tests; returns what went wrong, or nothing."""
    directory = ROOT / "build" / "matrix" / f"{Path(python).name}-{name}"
    own_python = directory / "bin" / "python"
    steps = {
        "makes no environment": [python, "-m", "venv", str(directory)],
        "does not install": [own_python, "-m", "pip", "install", "-q", "--upgrade", "-e", ".[test]", *pins],
        "fails": [own_python, "-m", "pytest", *QUICK],
    }
    for fault, command in steps.items():
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            return fault
    listed = subprocess.run([own_python, "-m", "pip", "list"], capture_output=True, text=True, check=True)
    print(*(line for line in listed.stdout.splitlines() if line.split()[0] in LIBRARIES), sep="; ")
    return ""


def runs(python: str) -> bool:
    """Whether a command is a Python that starts; a name on PATH may be a shim that does not."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def main(pythons: list[str]) -> int:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    choices: dict[str, Callable[[list[str]], Iterator[str]]] = {"oldest": oldest, "newest": newest}
    faults: dict[str, str] = {}
    for python in pythons:
        if not runs(python):
            faults[python] = "does not run; give another: make matrix PYTHON_311=… PYTHON_312=…"
            continue
        for name, choose in choices.items():
            pins = list(choose(requirements))
            print(f"{python}, {name}: {' '.join(pins)}", flush=True)
            if fault := run_cell(python, name, pins):
                faults[f"{python}, {name}"] = fault
    for cell, fault in faults.items():
        print(f"{cell} {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
