"""The kernels' tests are left out only where they have passed as they are; no test of theirs runs here."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from looptap.tests import kernel_tiers
from looptap.tests.kernel_tiers import FILES, ROOT, files_of, fingerprint
from looptap.tests.test_house import imports_of

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="Triton has wheels for Linux on x86-64 alone",
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the files that are looked at."""
    for path in files_of():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


@pytest.fixture
def run(tree, monkeypatch) -> Callable[..., list[str]]:
    """Runs what make does; returns `whole` or `part` for each tier that ran, which ends with a code."""

    def run(when: str, *codes: int) -> list[str]:
        ran, left = [], list(codes)

        def pytest_runs(command, **_):
            ran.append("part" if "-k" in command else "whole")
            return subprocess.CompletedProcess(command, left.pop(0))

        monkeypatch.setattr(kernel_tiers.subprocess, "run", pytest_runs)
        assert kernel_tiers.main([when, "-n", "2"], tree) == codes[-1] if codes else True
        return ran

    return run


def test_what_passed_runs_again_when_something_changed(run, tree):
    assert run("changed", 0, 0) == run("changed", 0, 0) == ["part", "part"], "a part is not all"
    assert run("always", 0, 0) == ["whole", "whole"]
    assert run("changed") == []
    path = next(tree.glob("kernels/gpu/*.py"))
    path.write_text(path.read_text() + "\n")
    assert run("changed", 0, 1) == ["whole", "whole"]
    assert run("changed", 1) == ["whole"], "it has not passed"
    assert run("changed", 0, 0) == ["whole", "whole"]
    assert run("changed") == []
    assert run("always", 0, 0) == ["whole", "whole"]


def test_every_file_and_version_counts(tree, monkeypatch):
    seen = {fingerprint(tree)}
    for path in files_of(tree):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        seen.add(fingerprint(tree))
        path.write_bytes(content)
    assert len(seen) == 1 + len(list(files_of(tree)))
    monkeypatch.setattr(kernel_tiers, "version", lambda name: "another")
    assert fingerprint(tree) not in seen


def test_what_they_import_is_among_the_files():
    """All of ours, whether by a relative or an absolute name."""
    paths = set(files_of())
    for path in [path for path in paths if path.suffix == ".py"]:
        for line, module, is_ours in imports_of(ROOT, path.relative_to(ROOT)):
            if not is_ours and module[0] != "looptap":
                continue
            base = ROOT.joinpath(*(module if is_ours else module[1:]))
            # the last part may be a name in a module
            found = {base.with_suffix(".py"), base / "__init__.py", base.parent.with_suffix(".py")} & paths
            is_folder = base.is_dir() and not (base / "__init__.py").exists()
            assert found or is_folder, f"{path}:{line} imports {'.'.join(module)}, which is not in {FILES}"


def test_a_pattern_that_matches_nothing_is_noticed(tree):
    shutil.rmtree(tree / "tests" / "kernels")
    with pytest.raises(AssertionError, match="no file is called tests/kernels"):
        fingerprint(tree)
