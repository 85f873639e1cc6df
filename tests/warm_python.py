"""A Python that has loaded what a command of looptap loads, and forks for each one that a test runs.

Loading torch takes seconds and a fork hundredths. A command that was forked is what a new process would be:
its environment, directory and output are its own, and huggingface_hub, which reads its settings when it is
imported, is not loaded yet.

Run as a script this file is that Python: it reads a job a line, and writes the exit code of each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WarmPython:
    """Runs one command at a time."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def run(
        self, arguments: list[str], cwd: Path, environment: dict[str, str], code: str | None = None
    ) -> subprocess.CompletedProcess:
        """Runs `python -m looptap ARGUMENTS`, or `python -c CODE ARGUMENTS`, and returns what it said."""
        output_paths = [cwd / ".stdout", cwd / ".stderr"]
        job = {"arguments": arguments, "cwd": str(cwd), "environment": environment, "code": code}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        exit_code = int(self._process.stdout.readline())
        stdout, stderr = (path.read_text() for path in output_paths)
        for path in output_paths:
            path.unlink()
        return subprocess.CompletedProcess(arguments, exit_code, stdout, stderr)


@contextmanager
def warm_python() -> Iterator[WarmPython]:
    """A warm Python, until the block is left."""
    # -P: the folders beside this file are no packages of their names
    with subprocess.Popen(
        [sys.executable, "-P", __file__],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads do not outlive a fork
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield WarmPython(process)
        assert process.stdin is not None
        process.stdin.close()


def _next_job() -> dict[str, Any]:
    """Waits for jobs; returns one in each process that is forked for it, and never in the parent."""
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def _become(job: dict[str, Any]) -> None:
    """Takes on what a new process would have been given."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    for descriptor, name in enumerate((os.devnull, ".stdout", ".stderr")):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(name, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["looptap" if job["code"] is None else "-c", *job["arguments"]]


def _run(job: dict[str, Any]) -> int:
    """Runs what was asked for; returns the exit code that Python would end with."""
    try:
        if job["code"] is None:
            looptap.cli.entry.main()
        else:
            exec(job["code"], {"__name__": "__main__"})
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return 1 if isinstance(ended.code, str) else ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    import looptap.capture.run
    import looptap.capture.watch
    import looptap.cli.entry

    assert "huggingface_hub" not in sys.modules
    job = _next_job()
    _become(job)
    exit_code = _run(job)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # to take all modules apart would take longer than most commands
