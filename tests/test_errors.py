"""Errors: what a user can act on is a UserError of a known kind, and nothing else is printed as a message.

Where a rule is about the source, a small tree with one fault shows that the rule finds it.
"""

import ast
import builtins
import errno
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import looptap
from looptap import errors
from looptap.capture.plan import make_plan
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.reading.reader import open_store
from looptap.cli import commands, entry
from looptap.errors import (
    DiskFullError,
    FileError,
    FileMissingError,
    PathTakenError,
    StoreError,
    UserError,
    os_errors_named,
)
from looptap.tests.s3_server import BUCKET, environment, serve_s3

ROOT = Path(__file__).parents[1]
STATUSES = {400, 404, 409, 422, 503}
KINDS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, UserError)]
NAMED = [cls for cls in KINDS if cls is not UserError]
TINY = "random:(0,2x3,0)I,width=32,heads=2"

# builtin exceptions that are raised on purpose, by file: broken promises inside looptap, or what a caller in
# the same part of the house catches
OURS = {
    "capture/memory.py": {"RuntimeError"},  # a unit failed, and the reason is a traceback
    "capture/taps/state_stream.py": {"RuntimeError"},  # becomes its unit's failure
    "capture/store/array_metadata.py": {"ValueError"},  # caught in group.py, and the array named
    "capture/store/ledger_entry.py": {"ValueError"},  # becomes a StoreError that names the entry
    "capture/store/layout.py": {"ValueError"},  # arrays and coordinates are planned by us
    "capture/store/places/bucket.py": {"FileExistsError"},  # how a place says that a name is taken
    "capture/store/places/directory_draft.py": {"FileExistsError"},
    "capture/store/places/disk.py": {"FileExistsError"},
    "capture/store/places/object_draft.py": {"FileExistsError"},
    "capture/store/reading/memory_map.py": {"OSError"},  # caught beside it
    "capture/store/writing/attempt.py": {"ValueError"},  # a worker gave the wrong unit, shape or arrays
    "capture/store/writing/encode.py": {"ValueError"},
    "capture/store/writing/shard.py": {"ValueError"},
}
CONTROL = {"AssertionError", "KeyboardInterrupt", "SystemExit"}


def builtin_raises(root: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, int, str]]:
    """(path, line, name) of every raise of a builtin exception, or of UserError itself."""
    for path in sorted(path for part in parts for path in (root / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = raised.id if isinstance(raised, ast.Name) else ""
            cls = getattr(builtins, name, None)
            is_builtin = isinstance(cls, type) and issubclass(cls, BaseException)
            if name == "UserError" or (is_builtin and name not in CONTROL):
                yield path.relative_to(root).as_posix(), node.lineno, name


def raise_faults(root: Path, parts: tuple[str, ...] = ("capture", "analysis", "cli")) -> list[str]:
    found = [(path, line, name) for path, line, name in builtin_raises(root, parts)]
    return [f"{path}:{line} raises {name}" for path, line, name in found if name not in OURS.get(path, set())]


def test_every_raise_names_a_kind():
    assert raise_faults(ROOT) == []


def test_the_list_of_our_own_raises_is_not_longer_than_needed():
    found = {(path, name) for path, _, name in builtin_raises(ROOT, ("capture", "analysis", "cli"))}
    assert {(path, name) for path, names in OURS.items() for name in names} == found


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise ValueError('no')", "raises ValueError"),
        ("def f():\n    raise OSError", "raises OSError"),
        ("raise UserError('no')", "raises UserError"),
        ("try:\n    f()\nexcept KeyError as e:\n    raise RuntimeError(e) from e", "raises RuntimeError"),
    ],
)
def test_a_plain_raise_is_found(tmp_path, code, fault):
    for name, text in (
        ("capture/sound.py", "raise ModelError('no')\nraise\nraise made(1)\n"),
        ("cli/a.py", code),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (found,) = raise_faults(tmp_path, ("capture", "cli"))
    assert found.startswith("cli/a.py:") and found.endswith(fault)


def test_no_other_module_defines_an_error():
    """Errors that begin with _ are caught in their own module."""
    found = []
    for part in ("capture", "analysis", "cli", "benchmarks", "kernels"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name[0] != "_":
                    found.append(f"{path}: {node.name}")
    assert found == []


@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_every_error_has_a_status_and_says_when(cls):
    assert cls.status in STATUSES
    assert cls.__doc__ and cls.__doc__.endswith(".")
    assert cls.__module__ == "looptap.errors"


@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_an_error_that_travels_comes_back_equal(cls):
    back = pickle.loads(pickle.dumps(cls("row 3: ünïcode\nand a second line")))
    assert type(back) is cls
    assert str(back) == "row 3: ünïcode\nand a second line" and back.status == cls.status


@pytest.mark.slow
def test_an_error_comes_back_from_another_process(tmp_path):
    """A worker's error arrives with its class and message, through a pickle on a pipe."""
    code = (
        "import pickle, sys\nfrom looptap.capture.models.load import find_model\n"
        "try:\n    find_model('/no/such/directory')\nexcept Exception as error:\n"
        "    sys.stdout.buffer.write(pickle.dumps(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    with pytest.raises(errors.ModelMissingError) as here:
        looptap.load_model("/no/such/directory")
    there = pickle.loads(done.stdout)
    assert (type(there), str(there), there.status) == (errors.ModelMissingError, str(here.value), 404)


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (errors.ModelError, ValueError),
        (errors.DataError, ValueError),
        (errors.PlanError, ValueError),
        (errors.SelectionError, ValueError),
        (errors.WatchError, ValueError),
        (errors.StoreError, OSError),
        (errors.StoreMissingError, FileNotFoundError),
        (errors.StoreExistsError, FileExistsError),
        (errors.ClusterError, OSError),
        (errors.MissingUnitsError, LookupError),
    ],
)
def test_builtin_bases_stay(cls, base):
    with pytest.raises(base, match="why"):
        raise cls("why")


def test_the_base_is_public():
    assert looptap.UserError is UserError and "UserError" in dir(looptap)
    assert looptap.WatchError is errors.WatchError


@pytest.fixture
def ended(monkeypatch, capfd, tmp_path) -> Callable[..., tuple[int, str]]:
    """Runs a command line in this process; returns its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            entry.main()
        return int(stop.value.code or 0), capfd.readouterr().err

    return run


def raising(error: BaseException) -> Callable[..., None]:
    def command(**_: object) -> None:
        raise error

    return command


@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_a_users_error_is_one_line_and_two(monkeypatch, ended, cls):
    monkeypatch.setattr(commands.app, "cli", raising(cls("what was wrong; what to do")))
    assert ended("info") == (2, "looptap: what was wrong; what to do\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes (2,) (3,)"),
        OSError(errno.EIO, "Input/output error"),
        KeyError("x"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_our_own_fault_is_a_traceback_and_seventy(monkeypatch, ended, error):
    monkeypatch.setattr(commands.app, "cli", raising(error))
    code, said = ended("info")
    assert code == 70
    assert "Traceback (most recent call last)" in said and type(error).__name__ in said
    assert said.splitlines()[-1].startswith("looptap: this is a fault of looptap")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.slow
def test_a_full_disk_behind_the_output(tmp_path, unbuffered):
    command = [sys.executable, "-m", "looptap", "info", TINY]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    wanted = "looptap: no room left for standard output or temporary files (No space left on device): "
    assert done.stderr == wanted + "make room and run it again\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("number", "cls", "status"),
    [
        (errno.ENOSPC, DiskFullError, 503),
        (errno.EDQUOT, DiskFullError, 503),
        (errno.EFBIG, DiskFullError, 503),
        (errno.ENOENT, FileMissingError, 404),
        (errno.EISDIR, PathTakenError, 409),
        (errno.ENOTDIR, PathTakenError, 409),
        (errno.EEXIST, PathTakenError, 409),
        (errno.EACCES, FileError, 422),
        (errno.EROFS, FileError, 422),
        (errno.EIO, FileError, 422),
    ],
)
def test_what_the_system_refuses_is_named(number, cls, status):
    with pytest.raises(FileError) as caught, os_errors_named("report.html", "written"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is cls and caught.value.status == status
    assert str(caught.value).startswith(f"report.html cannot be written: {os.strerror(number)}")


@pytest.mark.parametrize("error", [BrokenPipeError(), StoreError("it is damaged"), ValueError("ours")])
def test_other_errors_pass_a_door(error):
    with pytest.raises(type(error)) as caught, os_errors_named("report.html", "written"):
        raise error
    assert caught.value is error


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A small finished store."""
    path = tmp_path_factory.mktemp("errors") / "run.zarr"
    looptap.capture(TINY, [[1, 2, 3], [4, 5]], store=path)
    return path


def paths(directory: Path) -> dict[str, Path]:
    """Paths that cannot be written: a directory, below a file, on a full disk, a name that is too long."""
    (directory / "file").write_text("mine")
    (directory / "folder").mkdir()
    return {
        "directory": directory / "folder",
        "below a file": directory / "file" / "below",
        "full disk": Path("/dev/full"),
        "long name": directory / ("n" * 300),
        "no permission": Path("/proc/none/here"),
    }


@pytest.mark.parametrize("where", ["directory", "below a file", "full disk", "long name", "no permission"])
def test_a_page_that_cannot_be_written(ended, store, tmp_path, monkeypatch, where):
    from looptap.analysis.pages import report

    monkeypatch.setattr(report, "render", lambda *_: "<html>" + "x" * 100_000)  # drawing takes seconds
    path = paths(tmp_path)[where]
    code, said = ended("report", store, "--out", path)
    assert code == 2 and said.startswith("looptap: ") and said.count("\n") == 1, said
    assert "cannot be written" in said


@pytest.mark.parametrize("where", ["below a file", "full disk", "long name", "no permission"])
def test_tables_that_cannot_be_written(ended, store, tmp_path, where):
    code, said = ended("analyze", store, "--out", paths(tmp_path)[where])
    assert code == 2 and said.startswith("looptap: ") and said.count("\n") == 1, said
    assert "cannot be written" in said


@pytest.mark.parametrize("where", ["below a file", "full disk", "long name", "no permission"])
def test_a_store_that_cannot_be_made(ended, tmp_path, where):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a loop"}) + "\n")
    code, said = ended("capture", TINY, "--data", "data.jsonl", "--store", paths(tmp_path)[where])
    assert code == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("looptap: ")


@pytest.mark.parametrize("where", ["below a file", "full disk", "long name", "no permission"])
@pytest.mark.parametrize("command", ["status", "verify", "info", "report"])
def test_a_store_that_cannot_be_read(ended, tmp_path, command, where):
    code, said = ended(command, paths(tmp_path)[where])
    assert code == 2 and said.startswith("looptap: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("where", ["directory", "below a file", "full disk", "long name", "no permission"])
@pytest.mark.parametrize("option", ["--data", "--initial-state"])
def test_a_file_that_cannot_be_read(ended, tmp_path, option, where):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a loop"}) + "\n")
    given = {"--data": "data.jsonl", "--store": "run.zarr", option: paths(tmp_path)[where]}
    code, said = ended("capture", TINY, *(part for pair in given.items() for part in pair))
    assert code == 2 and said.startswith("looptap: ") and said.count("\n") == 1, said
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".npy", ".safetensors"])
def test_data_that_the_system_does_not_let_read(monkeypatch, tmp_path, suffix):
    """Tests may run as root, who may read everything: the refusal is put into open."""
    path = tmp_path / f"data{suffix}"
    path.write_text('{"text": "a loop"}\n')
    real = Path.open

    def refuse(self: Path, *arguments: object, **named: object):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="data") as caught:
        make_plan(CaptureSettings.of(model=TINY, data=path, store=tmp_path / "run.zarr"))
    assert caught.value.status == 422


def test_a_store_that_the_system_does_not_let_read(monkeypatch, store):
    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr("looptap.capture.store.places.directory.open_regular", refuse)
    with pytest.raises(StoreError, match=r"run\.zarr/zarr\.json cannot be read: Permission denied"):
        open_store(store)


def test_heads_that_no_kernel_takes_are_refused_by_the_plan(monkeypatch, tmp_path):
    """24 is a multiple of 8, 10 is not; a capture on a GPU would fail in every unit."""
    import torch

    (tmp_path / "data.txt").write_text("a loop")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for width, taken in ((48, True), (20, False)):
        spec = f"random:(0,2x3,0)I,width={width},heads=2"
        wanted = CaptureSettings.of(
            model=spec, data=tmp_path / "data.txt", store=tmp_path / "run.zarr", device="cuda"
        )
        if taken:
            make_plan(wanted)
        else:
            with pytest.raises(errors.PlanError, match="heads are 10 wide, and a GPU takes multiples of 8"):
                make_plan(wanted)


@pytest.fixture(scope="module")
def bucket():
    with serve_s3() as door, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in environment(door).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


def test_capture_takes_a_url_as_text(bucket, tmp_path):
    captured = looptap.capture(TINY, [[1, 2, 3], [4, 5]], store=f"{bucket}/captured.zarr").load()
    local = looptap.capture(TINY, [[1, 2, 3], [4, 5]])
    assert captured.drop_attrs().identical(local.drop_attrs())


@pytest.mark.slow
def test_watched_saves_to_a_url(bucket, tmp_path):
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with looptap.watch(module, "*", quantities=("residual",), store=f"{bucket}/watched.zarr") as watched:
        module(torch.ones(2, 3, 4))
    watched.save(f"{bucket}/again.zarr")
    for name in ("watched", "again"):
        found = looptap.open(f"{bucket}/{name}.zarr").load()
        assert found.drop_attrs().identical(watched.dataset().drop_attrs())
