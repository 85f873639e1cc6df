"""Commands that must be refused, for the tests of bad input; and what must not run beside many others."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from looptap.cli.entry import main

# pytest-xdist tells its workers that lines are 80 wide; then output would be broken as on a terminal
os.environ.pop("COLUMNS", None)

GOLDEN = Path(__file__).parent / "golden" / "llama"
TINY = "random:(0,2x3,0)I,width=32,heads=2"


def pytest_runtest_setup(item: pytest.Item) -> None:
    worker = getattr(item.config, "workerinput", None)  # of pytest-xdist, with the command's arguments
    is_among_many = worker is not None and "loadfile" not in worker["mainargv"]
    if is_among_many and item.get_closest_marker("apart"):
        pytest.fail(
            'it must run apart: pytest -n takes -m "not apart", or -n 2 --dist loadfile', pytrace=False
        )


@pytest.fixture
def files() -> Callable[[Path], dict[str, tuple[int, int, int]]]:
    """Lists everything below a directory, so that any change shows."""

    def below(root: Path) -> dict[str, tuple[int, int, int]]:
        found = ((path, path.lstat()) for path in sorted(root.rglob("*")))
        return {str(path): (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found}

    return below


@pytest.fixture
def refusal(files, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a command that must be refused; returns what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")  # no line of a message is broken

    def run(*arguments: object) -> str:
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        stdout, stderr = capsys.readouterr()
        assert ended.value.code == 2, stderr
        assert stdout == "" and "Traceback" not in stderr
        assert files(tmp_path) == before
        return stderr

    return run


@pytest.fixture
def message(refusal, tmp_path) -> Callable[..., str]:
    """Runs a capture that must be refused, into run.zarr unless told otherwise; returns the one message."""
    ids_path = tmp_path / "ids.npy"
    np.save(ids_path, np.arange(48).reshape(2, 24))

    def capture(
        model: object = TINY, *options: object, data: object = ids_path, store: object = "run.zarr"
    ) -> str:
        stderr = refusal("capture", model, "--data", data, "--store", store, *options)
        lines = stderr.splitlines()
        first = [number for number, line in enumerate(lines) if line.startswith("looptap: ")]
        assert len(first) == 1, stderr
        return "\n".join(lines[first[0] :]).removeprefix("looptap: ")

    return capture


@pytest.fixture
def model(tmp_path) -> Path:
    """A sound Llama checkpoint to damage."""
    shutil.copytree(
        GOLDEN, tmp_path / "model", ignore=shutil.ignore_patterns("inputs*", "reference*", "README*")
    )
    return tmp_path / "model"
