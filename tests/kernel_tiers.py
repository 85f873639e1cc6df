"""Runs the tests of the kernels, which take minutes, where they have not passed before as they are.

    python -m looptap.tests.kernel_tiers always     everything
    python -m looptap.tests.kernel_tiers changed    nothing where everything passed here before with the same
                                                    files and versions; everything where something has changed
                                                    since; and a part where it never all passed here

What passed is remembered in build/, which git does not know, so a fresh clone has run nothing. Further
arguments are pytest's.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
# all that can change how a kernel is compiled, what it computes, and what is asked of it
FILES = ("kernels/**/*.py", "kernels/**/*.json", "tests/kernels/**/*.py", "tests/ahead/**/*.py",
         "tests/kernel_tiers.py", "benchmarks/ahead/*.py")  # fmt: skip
PACKAGES = ("triton", "torch", "numpy", "pytest")
# TRITON_INTERPRET, paths and what of them is a part: each tier is a process of its own, as a kernel is either
# compiled or interpreted
TIERS = (
    ("0", ("tests/ahead",), "byte or seen or lengthen"),
    ("1", ("tests/kernels",), "edge or matches_reference or cpu_run or neighbour or leak"),
)


def files_of(root: Path = ROOT) -> Iterator[Path]:
    """The files that the tests of the kernels depend on.

    Raises:
        AssertionError: a pattern of FILES matches none, so it was not moved with them.
    """
    for pattern in FILES:
        paths = sorted(path for path in root.glob(pattern) if path.is_file())
        assert paths, f"no file is called {pattern}"
        yield from paths


def fingerprint(root: Path = ROOT) -> str:
    """Returns one hash of these files and of the versions of what compiles and runs them."""
    state = hashlib.sha256(" ".join([sys.version, *map(version, PACKAGES)]).encode())
    for path in files_of(root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        state.update(f"{path.relative_to(root)} {content}\n".encode())
    return state.hexdigest()


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Returns the exit code of the first tier that fails, or 0."""
    when, *options = arguments
    stamp_path, now = root / "build" / "kernels-passed.json", fingerprint(root)
    before = json.loads(stamp_path.read_text())["fingerprint"] if stamp_path.exists() else None
    if when == "changed" and before == now:
        print(
            "kernels: not tested, as nothing has changed since all of their tests passed here; "
            "make kernels runs them again"
        )
        return 0
    is_part = when == "changed" and before is None
    if is_part:
        print(
            "kernels: a part of their tests runs, as they have never all passed here; make kernels, or "
            "make test-all, runs them all",
            flush=True,
        )
    for interpret, paths, part in TIERS:
        command = [sys.executable, "-m", "pytest", *paths, *options, *(["-k", part] if is_part else [])]
        environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
        if code := subprocess.run(command, cwd=root, env=environment, check=False).returncode:
            return code
    if not is_part and fingerprint(root) == now:  # else they changed while their tests ran
        stamp_path.parent.mkdir(exist_ok=True)
        stamp_path.write_text(json.dumps({"fingerprint": now}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
