"""Everything there is to know of the kernels on the GPU at hand, in one file: right, repeatable, clean under
the memory tools, whole in CUDA graphs and torch.compile, and how fast beside what else there is.

`make gpu` runs it with the machine's own python3, which needs torch, triton, numpy, pytest and safetensors;
this package need not be installed. Every step has a process and a time limit of its own, and the
results file, benchmarks/results/kernels-DEVICE-TRITON.json, is written anew after each, so that whatever
happens the rest is there. A tool that the machine lacks is recorded as missing. The device's clocks are
recorded as found and left alone.

Exit code 0: every step ran and every goal is met; 1: not so; 2: no GPU. `--collect` runs what a machine
without a GPU can: imports with everything else forbidden, collection of the tests, every step small and on
the CPU.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .gpu_steps import STEPS

ROOT = Path(__file__).parents[1]
RESULTS_DIR = Path(__file__).parent / "results"
# what the steps may not need, though other parts of this package do
FORBIDDEN = ("zarr", "ray", "tyro", "xarray", "pyarrow", "altair", "google_crc32c", "transformers")
_GUARD = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is not on the GPU machine")
sys.meta_path.insert(0, Guard())
import looptap.benchmarks.gpu_steps
"""
STEP_S = 300  # that one step may take
_TAIL = 3000  # characters of a step's output that are kept
_SANITIZER = ("--error-exitcode", "99", "--print-limit", "20")
_SHARE = 0.03  # by which counted bytes may be off


@dataclass(frozen=True)
class Context:
    """Options that steps are run with."""

    device: str
    directory: Path
    deadline_s: float

    def run(self, command: Sequence[str], **environment: str) -> tuple[int | None, str]:
        """Exit code and output; no code if the time was over. A pytest around it lends no options."""
        left_s = min(STEP_S, self.deadline_s - time.monotonic())
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTEST_ADDOPTS": "", **environment}
        path = self.directory / "output.txt"
        with path.open("wb") as output:
            try:
                code = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, timeout=left_s, cwd=ROOT, env=variables
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        return code, path.read_text(errors="replace")

    def step(self, name: str, prefix: Sequence[str] = (), **environment: str) -> dict[str, Any]:
        """One of gpu_steps, behind a tool's command if there is one."""
        result = self.directory / f"{name}.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "looptap.benchmarks.gpu_steps", name, str(result)]
        code, output = self.run([*prefix, *command, "--device", self.device], **environment)
        found = json.loads(result.read_text()) if result.exists() else {}
        faults = found.get("faults")
        status = "timed out" if code is None else "failed" if code or faults else "ok"
        return {"status": status, **found, "output": output[-_TAIL:]}


def run_tests(context: Context) -> dict[str, Any]:
    """The tests of the kernels; without a GPU they are only collected, as for the interpreter."""
    (context.directory / "pytest.ini").write_text("[pytest]\n")
    report = context.directory / "report.xml"
    options = ["-c", str(context.directory / "pytest.ini"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    options += ["--import-mode=importlib", "--confcutdir", "tests/kernels", "-q", "--junitxml", str(report)]
    command = [sys.executable, "-m", "pytest", "tests/kernels", *options]
    if context.device == "cpu":
        code, output = context.run([*command, "--collect-only"], TRITON_INTERPRET="1")
        found = re.search(r"^(\d+) tests? collected", output, re.M)
        num_tests = int(found[1]) if found else 0
        status = "failed" if code or not num_tests else "ok"
        return {"status": status, "num_collected": num_tests, "output": output[-_TAIL:]}
    code, output = context.run(command)
    status = "timed out" if code is None else "failed" if code else "ok"
    return {"status": status, **_read_report(report), "output": output[-_TAIL:]}


def _read_report(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return {
        "num_tests": len(cases),
        "num_skipped": sum(c.find("skipped") is not None for c in cases),
        "failed": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
    }


def sanitize(tool: str) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        path = _find_tool("compute-sanitizer")
        if path is None or context.device == "cpu":
            return {"status": "missing" if path is None else "not run", "tool": "compute-sanitizer"}
        # every tensor its own allocation, so that the tool sees where each ends
        prefix = (path, "--tool", tool, *_SANITIZER)
        return context.step("calls", prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    return run


def check_concurrency(context: Context) -> dict[str, Any]:
    """Triton's own sanitizer of asynchronous copies and barriers, compiled into the kernels."""
    if context.device == "cpu":
        return {"status": "not run"}
    cache = str(context.directory / "consan")
    return context.step("calls", TRITON_INSTRUMENTATION_MODE="consan", TRITON_CACHE_DIR=cache)


def count_bytes(context: Context) -> dict[str, Any]:
    """Counts the bytes that the residual norm moves through memory, beside the formula."""
    path = _find_tool("ncu")
    if path is None or context.device == "cpu":
        return {"status": "missing" if path is None else "not run", "tool": "ncu"}
    prefix = (
        path,
        "--clock-control",
        "none",
        "--metrics",
        "dram__bytes.sum",
        "--csv",
        "--print-units",
        "base",
    )
    found = context.step("norms_once", (*prefix, "-k", "regex:^_kernel"))
    counted = _read_counts((context.directory / "output.txt").read_text(errors="replace"))
    shares = [n / expected for n, expected in zip(counted, found.get("expected_bytes", ()), strict=False)]
    is_right = len(shares) == 2 and all(abs(share - 1) <= _SHARE for share in shares)
    status = "failed" if found["status"] == "ok" and not is_right else found["status"]
    return {**found, "status": status, "counted_bytes": counted, "counted_per_expected": shares}


def _read_counts(output: str) -> list[float]:
    """The metric's values in ncu's csv, which stands behind whatever the program printed."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(lines[first:])
    return [float(row["Metric Value"].replace(",", "")) for row in rows if row.get("Metric Value")]


def _find_tool(name: str) -> str | None:
    beside_nvcc = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(beside_nvcc) if beside_nvcc.exists() else None)


def import_alone(context: Context) -> dict[str, Any]:
    """The steps import with everything forbidden that they must not need."""
    code, output = context.run([sys.executable, "-c", _GUARD.format(names=FORBIDDEN)])
    return {"status": "failed" if code else "ok", "forbidden": FORBIDDEN, "output": output[-_TAIL:]}


def _own_step(name: str) -> Callable[[Context], dict[str, Any]]:
    return lambda context: context.step(name)


# in order: what is wrong first, then what is fast, then what may take long
PLAN: dict[str, Callable[[Context], dict[str, Any]]] = {
    "imports": import_alone,
    "tests": run_tests,
    **{
        step.__name__: _own_step(step.__name__)
        for step in STEPS
        if step.__name__ not in ("calls", "norms_once")
    },
    "bytes": count_bytes,
    "memcheck": sanitize("memcheck"),
    "racecheck": sanitize("racecheck"),
    "initcheck": sanitize("initcheck"),
    "consan": check_concurrency,
}


def describe_machine(device: str) -> dict[str, Any]:
    """Device, driver, clocks as they are, versions and the commit."""
    import torch
    import triton

    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    on_gpu = device == "cuda"
    status = _output("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "nvidia_smi": dict(
            zip(
                query.split(","),
                (_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "").split(", "),
                strict=False,
            )
        ),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "commit": _output("git", "rev-parse", "HEAD"),
        "commit_is_changed": None if status is None else bool(status),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    """Returns what a command printed; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run_plan(names: Sequence[str], device: str, minutes: float, path: Path | None) -> dict[str, Any]:
    """Runs steps in order and returns the record, which is also in the file."""
    record: dict[str, Any] = {"benchmark": "kernels", **describe_machine(device), "steps": {}}
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{record['device']}-{record['versions']['triton']}".lower())
    path = path or RESULTS_DIR / f"kernels-{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as directory:
        context = Context(device, Path(directory), deadline_s)
        for name in names:
            started_s = time.monotonic()
            if started_s >= deadline_s:
                found: dict[str, Any] = {"status": "not started"}
            else:
                try:
                    found = PLAN[name](context)
                except Exception as error:  # one step must not lose the others
                    found = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            found = {**found, "seconds": round(time.monotonic() - started_s, 1)}
            record["steps"][name] = found
            path.write_text(json.dumps(record, indent=1) + "\n")
            _print_step(name, found)
    print(f"results: {path}")
    return record


def _print_step(name: str, found: dict[str, Any]) -> None:
    print(f"{name:10} {found['status']:12} {found['seconds']:6.1f} s")
    for fault in (*found.get("failed", ()), *(found.get("faults") or {}).items()):
        print(f"    {fault}")
    for goal in found.get("goals", ()):
        value = "nothing" if goal["value"] is None else f"{goal['value']:.3g}"
        bound = f"<= {goal['at_most']}" if goal["at_most"] is not None else f">= {goal['at_least']}"
        print(f"    {'met   ' if goal['is_met'] else 'MISSED'} {goal['name']}: {value}, must be {bound}")
    for case, why in (found.get("failures") or {}).items():
        print(f"    {case} could not run: {why}")
    if found["status"] in ("failed", "timed out"):
        print(found.get("error", found.get("output", "")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and measure the kernels on the GPU at hand.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these of {', '.join(PLAN)}")
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it (8)")
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--collect", action="store_true", help="what can be run without a GPU; needs --out")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(PLAN):
        parser.error(f"no step is named {', '.join(sorted(unknown))}; there are {', '.join(PLAN)}")
    if arguments.collect and arguments.out is None:
        parser.error("--collect needs --out: results/ is for GPUs")
    device = "cpu" if arguments.collect else "cuda"
    if device == "cuda" and not _has_gpu():
        print(
            "no GPU was found that this PyTorch can use: nothing was run. --collect --out FILE runs what "
            "needs none.",
            file=sys.stderr,
        )
        sys.exit(2)
    record = run_plan(arguments.steps or list(PLAN), device, arguments.minutes, arguments.out)
    passed = ("ok", "not run", "missing") if device == "cpu" else ("ok", "missing")
    done = all(step["status"] in passed for step in record["steps"].values())
    missed = [g for step in record["steps"].values() for g in step.get("goals", ()) if not g["is_met"]]
    sys.exit(0 if done and (device == "cpu" or not missed) else 1)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
