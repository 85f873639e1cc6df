"""The house keeps its shape: who imports whom, which folders are packages, what an import loads.

Imports are read from the source, so one inside a function or under TYPE_CHECKING counts like any other. Every
check also runs on a small tree with one fault put in, to show that it finds it.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_PACKAGES = {"tests", "build", "dist", "demo"}

# what each part may import of ours besides itself; None: everything
ARROWS: dict[str, set[str] | None] = {
    "looptap": None,
    "benchmarks": None,
    "cli": {"looptap", "analysis", "benchmarks", "capture", "capture.models", "capture.store", "errors"},
    "analysis": {"capture.store", "errors", "kernels"},
    "capture": {"capture.models", "capture.store", "errors", "kernels"},
    "capture.models": {"errors", "kernels"},
    "capture.store": {"errors"},
    "errors": set(),
    "kernels": set(),
}
# what each part must not import of others, wherever in the file
BANNED = {
    "analysis": {"ray", "triton", "transformers"},
    "capture.models": {"ray", "zarr", "xarray", "transformers"},
    "capture.store": {"torch", "ray", "triton", "transformers"},
    # kernels are compiled by their launch; what compiles them ahead of it is in benchmarks/ahead
    "kernels": {
        "concurrent",
        "multiprocessing",
        "subprocess",
        "tempfile",
        "triton.backends",
        "triton.compiler",
    },
}
# parts that import nothing of others but these
MAY = {"kernels": {"torch", "triton", *sys.stdlib_module_names}, "errors": sys.stdlib_module_names}
# files whose name another has as well, as both are of one thing: a kernel and its form on a CPU, a plan and
# what a store holds of it
ONE_THING = {"kernels/gpu", "capture/store/plan.py"}


def source_paths(root: Path) -> list[Path]:
    """Every module of the package whose folder is root, relative to root."""
    paths = list(root.glob("*.py"))
    for folder in root.iterdir():
        is_ours = folder.is_dir() and folder.name not in NO_PACKAGES and not folder.name.startswith(".")
        if is_ours and not (folder / "pyvenv.cfg").exists():
            paths += folder.rglob("*.py")
    return sorted(path.relative_to(root) for path in paths)


def part_of(module: tuple[str, ...]) -> str:
    """The part of the house, a key of ARROWS if it has one, that a module's dotted path lies in."""
    if module in ((), ("__main__",), ("__init__",)):
        return "looptap"
    inner = ".".join(module[:2])
    return inner if inner in ARROWS else module[0]


def imports_of(root: Path, path: Path) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    """(line, dotted path, ours) of each import in a module; ours are relative to the package."""
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split(".")), False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level == 0:
                yield from ((node.lineno, (*named, alias.name), False) for alias in node.names)
                continue
            here = path.parent.parts
            assert node.level <= len(here) + 1, f"{path}:{node.lineno} reaches above the package"
            base = (*here[: len(here) + 1 - node.level], *named)
            for alias in node.names:
                inner = root.joinpath(*base, alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield node.lineno, (*base, alias.name) if is_module else base, True


def is_banned(part: str, module: tuple[str, ...]) -> bool:
    return any(".".join(module[:n]) in BANNED.get(part, set()) for n in range(1, len(module) + 1))


def import_faults(root: Path) -> list[str]:
    """One line for each import that the arrows of the house do not allow."""
    faults = []
    for path in source_paths(root):
        part = part_of(path.with_suffix("").parts if path.stem != "__init__" else path.parent.parts)
        if part not in ARROWS:
            faults.append(f"{path}: no arrows are drawn for {part}; add it to ARROWS and to the package list")
            continue
        allowed = ARROWS[part]
        for line, module, ours in imports_of(root, path):
            name = ".".join(module)
            if ours:
                if allowed is not None and part_of(module) not in {part, *allowed}:
                    faults.append(f"{path}:{line}: {part} imports {part_of(module)} ({name})")
            elif module[0] == "looptap":
                faults.append(f"{path}:{line}: {name} is ours; import it relatively")
            elif module[0] not in MAY.get(part, module) or is_banned(part, module):
                faults.append(f"{path}:{line}: {part} imports {name}")
    return faults


def package_faults(root: Path) -> list[str]:
    """One line for each folder that pyproject.toml and the tree disagree on, or that must be no package."""
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(("looptap", *path.parent.parts)) for path in source_paths(root)}
    faults = [f"{name} is missing from packages in pyproject.toml" for name in sorted(found - listed)]
    faults += [f"{name} is in pyproject.toml and not in the tree" for name in sorted(listed - found)]
    for name in ("kernels", "tests"):
        if (root / name / "__init__.py").exists():
            faults.append(f"{name}/__init__.py takes a name that belongs to others")
    return faults


def circle_faults(root: Path) -> list[str]:
    """One line for each circle of files that import one another, also inside functions."""
    paths = {path.with_suffix("").parts: path for path in source_paths(root)}
    imports = {
        module: {to for _, to, ours in imports_of(root, path) if ours and to in paths and to != module}
        for module, path in paths.items()
    }
    faults, done = [], set[tuple[str, ...]]()

    def follow(module: tuple[str, ...], way: list[tuple[str, ...]]) -> None:
        if module in way:
            circle = way[way.index(module) :]
            faults.append(" -> ".join(".".join(each) for each in [*circle, module]))
        elif module not in done:
            for to in sorted(imports[module]):
                follow(to, [*way, module])
            done.add(module)

    for module in sorted(imports):
        follow(module, [])
    return faults


def name_faults(root: Path) -> list[str]:
    """One line for each two files whose names are the same, or differ by one letter."""
    named: dict[str, list[Path]] = {}
    for path in source_paths(root):
        if not path.name.startswith("__") and not ONE_THING & {str(path), path.parent.as_posix()}:
            named.setdefault(path.stem, []).append(path)
    faults = [f"{' and '.join(map(str, paths))} have one name" for paths in named.values() if len(paths) > 1]
    for one, other in combinations(sorted(named), 2):
        if differ_by_a_letter(one, other) and one.replace("cpu", "gpu") != other:
            faults.append(f"{named[one][0]} and {named[other][0]} differ by one letter")
    return faults


def differ_by_a_letter(one: str, other: str) -> bool:
    """Whether one letter more, less or otherwise makes one of the other."""
    short, long = sorted((one, other), key=len)
    if len(long) - len(short) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    rest = long[start + 1 :]
    return rest == (short[start + 1 :] if len(short) == len(long) else short[start:])


def loaded_by(code: str, names: set[str], cwd: Path) -> set[str]:
    """Returns those of the modules that a fresh Python has loaded after running code."""
    code = f"{code}\nimport sys\nprint('loaded:', *({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_imports_follow_the_arrows():
    assert import_faults(ROOT) == []


def test_no_files_import_one_another():
    assert circle_faults(ROOT) == []


def test_no_two_files_are_mistaken_for_one_another():
    assert name_faults(ROOT) == []


def test_packages_are_complete():
    assert package_faults(ROOT) == []


@pytest.fixture
def small_tree(tmp_path):
    """A house in miniature, without a fault."""
    files = {
        "__init__.py": "",
        "__main__.py": "from .analysis import measures\nfrom .capture.models import loop\nimport zarr\n",
        "analysis/__init__.py": "",
        "analysis/measures.py": "from ..capture.store import format\nfrom ..kernels import norm\nimport re\n",
        "capture/__init__.py": "",
        "capture/worker.py": "from . import models\nfrom .models.loop import Loop\nfrom .store import *\n",
        "capture/models/__init__.py": "",
        "capture/models/loop.py": "import torch\nfrom ...kernels import norm\n\n\nclass Loop: ...\n",
        "capture/store/__init__.py": "",
        "capture/store/format.py": "import zarr\nfrom . import __doc__\nfrom ...errors import StoreError\n",
        "errors.py": "class StoreError(Exception): ...\n",
        "kernels/norm.py": "import math\nimport torch\nfrom . import reference\n\n\ndef norm(): ...\n",
        "kernels/reference.py": "",
        "tests/test_norm.py": "from looptap.kernels import norm\n",
        ".venv/lib/other.py": "import looptap\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    packages = ["", ".analysis", ".capture", ".capture.models", ".capture.store", ".kernels"]
    listed = ", ".join(f'"looptap{name}"' for name in packages)
    (tmp_path / "pyproject.toml").write_text(f"[tool.setuptools]\npackages = [{listed}]\n")
    return tmp_path


def test_a_tree_without_fault_passes(small_tree):
    assert import_faults(small_tree) == []
    assert package_faults(small_tree) == []
    assert circle_faults(small_tree) == []
    assert name_faults(small_tree) == []


@pytest.mark.parametrize(
    ("name", "code", "fault"),
    [
        ("analysis/a.py", "from ..capture import worker", "analysis imports capture (capture.worker)"),
        ("analysis/a.py", "from ..capture.models.loop import Loop", "analysis imports capture.models"),
        ("analysis/__init__.py", "from ..capture import models", "analysis imports capture.models"),
        ("analysis/a.py", "def f():\n    import triton.language", "analysis imports triton.language"),
        ("analysis/a.py", "import ray", "analysis imports ray"),
        ("capture/a.py", "from ..analysis.measures import x", "capture imports analysis"),
        ("capture/__init__.py", "from .. import analysis", "capture imports analysis"),
        ("capture/models/a.py", "from ..store import format", "capture.models imports capture.store"),
        ("capture/models/a.py", "from .. import worker", "capture.models imports capture (capture.worker)"),
        (
            "capture/models/a.py",
            "if TYPE_CHECKING:\n    from ..worker import W",
            "capture.models imports capture",
        ),
        ("capture/models/a.py", "import zarr", "capture.models imports zarr"),
        ("capture/store/a.py", "from ..worker import Worker", "capture.store imports capture"),
        ("capture/store/a.py", "from ...kernels.norm import norm", "capture.store imports kernels"),
        ("capture/store/a.py", "from torch import Tensor", "capture.store imports torch"),
        ("kernels/a.py", "from ..capture.store import format", "kernels imports capture.store"),
        ("kernels/a.py", "from .. import __version__", "kernels imports looptap"),
        ("kernels/a.py", "from ..errors import UserError", "kernels imports errors"),
        ("kernels/a.py", "import numpy as np", "kernels imports numpy"),
        ("errors.py", "from .capture.store import format", "errors imports capture.store"),
        ("errors.py", "import zarr", "errors imports zarr"),
        ("kernels/a.py", "def f():\n    from zarr.core import x", "kernels imports zarr.core"),
        ("kernels/a.py", "from concurrent.futures import Future", "kernels imports concurrent.futures"),
        ("kernels/a.py", "from triton import compiler, language", "kernels imports triton.compiler"),
        (
            "kernels/a.py",
            "def f():\n    from triton.compiler import ASTSource",
            "kernels imports triton.comp",
        ),
        ("benchmarks/a.py", "from looptap.kernels import norm", "looptap.kernels.norm is ours"),
        ("serving/a.py", "", "no arrows are drawn for serving"),
    ],
)
def test_a_wrong_import_is_found(small_tree, name, code, fault):
    (small_tree / name).parent.mkdir(exist_ok=True)
    (small_tree / name).write_text(code + "\n")
    (found,) = import_faults(small_tree)
    assert found.startswith(name) and fault in found


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("analysis/figures/a.py", "looptap.analysis.figures is missing"),
        ("kernels/__init__.py", "kernels/__init__.py takes a name"),
        ("tests/__init__.py", "tests/__init__.py takes a name"),
    ],
)
def test_a_wrong_file_is_found(small_tree, name, fault):
    (small_tree / name).parent.mkdir(exist_ok=True)
    (small_tree / name).touch()
    (found,) = package_faults(small_tree)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("name", "code", "circle"),
    [
        (
            "kernels/reference.py",
            "from .norm import norm",
            "kernels.norm -> kernels.reference -> kernels.norm",
        ),
        (
            "capture/models/loop.py",
            "def f():\n    from .. import worker",
            "capture.models.loop -> capture.worker -> capture.models.loop",
        ),
    ],
)
def test_a_circle_is_found(small_tree, name, code, circle):
    (small_tree / name).write_text(code + "\n")
    assert circle_faults(small_tree) == [circle]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("analysis/worker.py", "analysis/worker.py and capture/worker.py have one name"),
        ("analysis/forma.py", "analysis/forma.py and capture/store/format.py differ by one letter"),
        ("analysis/normal.py", ""),
        ("analysis/formal.py", "analysis/formal.py and capture/store/format.py differ by one letter"),
        ("analysis/loops.py", "capture/models/loop.py and analysis/loops.py differ by one letter"),
        ("analysis/worken.py", "analysis/worken.py and capture/worker.py differ by one letter"),
        ("kernels/gpu/norm.py", ""),
    ],
)
def test_names_that_are_mistaken_are_found(small_tree, name, fault):
    (small_tree / name).parent.mkdir(exist_ok=True)
    (small_tree / name).touch()
    assert "".join(name_faults(small_tree)) == fault


def test_a_listed_folder_that_is_gone_is_found(small_tree):
    for path in (small_tree / "kernels").iterdir():
        path.unlink()
    assert package_faults(small_tree) == ["looptap.kernels is in pyproject.toml and not in the tree"]


SHOW_HELP = """
import sys, looptap.cli.entry
sys.argv = ["looptap", "--help"]
try:
    looptap.cli.entry.main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import looptap", {"torch", "zarr", "ray", "triton", "transformers"}),
        ("import looptap, looptap.analysis", {"torch", "ray", "triton", "transformers"}),
        (SHOW_HELP, {"torch", "zarr", "ray", "triton", "transformers"}),
    ],
    ids=["import", "analysis", "help"],
)
def test_heavy_modules_stay_out(code, heavy, tmp_path):
    assert loaded_by(code, heavy, cwd=tmp_path) == set()


def test_a_heavy_module_is_seen(tmp_path):
    assert loaded_by("import zarr", {"torch", "zarr"}, cwd=tmp_path) == {"zarr"}


def test_models_and_kernels_load_torch_alone(tmp_path):
    """They run where nothing else of ours is installed; Triton is loaded by the first launch on a GPU."""
    modules = ("capture.taps.statistics", "capture.models.load", "kernels.attention_pairs")
    code = "\n".join(f"import looptap.{name}" for name in modules)
    others = {"triton", "zarr", "xarray", "ray", "tyro", "rich", "pyarrow", "huggingface_hub", "tokenizers"}
    assert loaded_by(code, others | {"torch"}, cwd=tmp_path) == {"torch"}
