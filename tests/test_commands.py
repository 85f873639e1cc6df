"""The commands as they are typed: what they print, how they end, and that Python gives the same.

Most run in this process, as importing torch takes seconds; what depends on the terminal runs in its own.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import xarray as xr

import looptap
from looptap.capture.models.load import load_model
from looptap.capture.probes.neurons import logit_moments, summarise
from looptap.capture.settings import (
    ArchitectureStudySettings,
    CaptureSettings,
    DepthStudySettings,
    InspectSettings,
)
from looptap.capture.store.writing.commit import Store
from looptap.cli.entry import main

MODEL = "random:(1,2x3,1)I,width=32,heads=2,norm=huginn"
TEXTS = ["a loop", "", "and the same again, a little longer", "ünïcode", "a loop"]
NUM_TOKENS = sum(len(text.encode()) for text in TEXTS)
OPTIONS = ["--unit-tokens", "40", "--states", "core[all]@last", "--tokens", "last"]
SETTINGS = {"unit_tokens": 40, "states": ("core[all]@last",), "tokens": "last"}
NUM_UNITS = 2  # 35 tokens; 9, 6 and 6


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def looptap_command(monkeypatch, capsys) -> Callable[..., Ended]:
    """Runs a command line in this process, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run


def write_texts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def piped(tmp_path_factory) -> tuple[Path, Ended]:
    """A capture by `python -m looptap` with its output in pipes: the store, and how it ended."""
    path = tmp_path_factory.mktemp("piped")
    write_texts(path / "texts.jsonl")
    command = [
        sys.executable,
        "-m",
        "looptap",
        "capture",
        MODEL,
        "--data",
        "texts.jsonl",
        "--store",
        "run.zarr",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    done = subprocess.run([*command, *OPTIONS], cwd=path, env=environment, capture_output=True, text=True)
    return path / "run.zarr", Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def store(piped, tmp_path) -> Path:
    """A finished store to look at or to damage, with its data beside it."""
    write_texts(tmp_path / "texts.jsonl")
    return Path(shutil.copytree(piped[0], tmp_path / "run.zarr"))


def rows(text: str) -> dict[str, str]:
    """A grid of names and values, with lines that were broken put together."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"([\w-]+(?: \w+)?) {2,}(.*)", line.rstrip()):
            name = match[1]
            found[name] = match[2]
        elif name and line.startswith("  "):
            found[name] += " " + line.strip()
    return found


def test_capture_is_quiet_in_a_pipe(piped):
    _, ended = piped
    assert (ended.code, ended.stdout) == (0, ""), ended.stderr
    assert "\x1b" not in ended.stderr and "\r" not in ended.stderr
    said = rows(ended.stderr)
    assert said["data"] == f"4 sequences, {NUM_TOKENS} tokens; 1 empty rows get no slots"
    assert said["units"] == f"{NUM_UNITS} of 40 token slots, 8 block invocations a token"
    assert said["model"].endswith("(1,2x3,1)I, huginn norms, float32 on cpu")
    assert re.search(rf"^{NUM_UNITS} of {NUM_UNITS} units are in run.zarr; this run took", ended.stderr, re.M)


@pytest.mark.slow
def test_capture_shows_a_bar_on_a_terminal(tmp_path):
    """A terminal of 100 columns: colours, the units, a rate."""
    write_texts(tmp_path / "texts.jsonl")
    command = [
        sys.executable,
        "-m",
        "looptap",
        "capture",
        MODEL,
        "--data",
        "texts.jsonl",
        "--store",
        "run.zarr",
    ]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "TTY_COMPATIBLE")}
    environment["TERM"] = "xterm"
    child = subprocess.Popen(
        [*command, *OPTIONS], cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # the terminal is gone with the last process on it
            break
    os.close(ours)
    assert child.wait() == 0, said.decode()
    assert "\x1b[" in said.decode()
    assert f"{NUM_UNITS}/{NUM_UNITS} units" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert re.search(r"\d tokens, [\d.]+k?/s", said.decode())


def test_status(looptap_command, store):
    ended = looptap_command("status", store)
    assert ended.code == 0 and ended.stderr == ""
    said = rows(ended.stdout)
    assert said["units"] == f"{NUM_UNITS} of {NUM_UNITS}, complete"
    assert said["captured"] == f"4 sequences, {NUM_TOKENS} tokens"
    assert said["at work"] == "nobody"


def test_verify_and_one_flipped_bit(looptap_command, store):
    ended = looptap_command("verify", store)
    assert ended.code == 0 and ended.stdout.endswith("every committed file is as it was written\n")
    shard = store / "gap_norm" / "c.1.0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ended = looptap_command("verify", store)
    assert ended.code == 1
    assert re.search(r"gap_norm/c\.1\.0 \(unit 1\): crc32c is \w+, \w+ was written", ended.stdout)
    assert ended.stdout.endswith("1 problems\n")


def test_verify_counts_what_is_missing(looptap_command, store):
    for path in (store / ".looptap" / "ledger" / "1.json", store / ".looptap" / "complete"):
        path.unlink()
    ended = looptap_command("verify", store)
    assert ended.code == 1 and "1 units are missing; the capture's command continues it" in ended.stdout
    assert rows(looptap_command("status", store).stdout)["units"] == f"1 of {NUM_UNITS}"


def test_resume_says_what_was_there(looptap_command, store, monkeypatch):
    monkeypatch.chdir(store.parent)
    command = ["capture", MODEL, "--data", "texts.jsonl", "--store", "run.zarr", *OPTIONS]
    ended = looptap_command(*command)
    assert ended.code == 0
    assert f"{NUM_UNITS} of {NUM_UNITS} units are in run.zarr, {NUM_UNITS} of them before" in ended.stderr
    before = (store / ".looptap" / "ledger" / "0.json").read_bytes()
    for path in (store / ".looptap" / "ledger" / "1.json", store / ".looptap" / "complete"):
        path.unlink()
    ended = looptap_command(*command)
    assert ended.code == 0
    assert f"{NUM_UNITS} of {NUM_UNITS} units are in run.zarr, 1 of them before" in ended.stderr
    assert (store / ".looptap" / "ledger" / "0.json").read_bytes() == before
    assert looptap_command("verify", "run.zarr").code == 0


def test_info_of_a_store(looptap_command, store):
    ended = looptap_command("info", store)
    plan = Store.open(store).plan
    said = rows(ended.stdout)
    assert ended.code == 0 and "(1,2x3,1)I, huginn norms, float32" in said["model"]
    assert said["weights"].startswith(f"{plan.model.num_parameters} parameters, sha256 ")
    assert (plan.model.weights_sha256 or "").startswith(said["weights"].split()[-1].rstrip("…"))
    assert said["data"] == f"texts.jsonl, 4 sequences, {NUM_TOKENS} tokens"
    assert said["states"] == "core[all]@last of tokens last"
    assert set(said["quantities"].split(", ")) == set(plan.settings.quantities)


def test_info_of_neurons(looptap_command, store, tmp_path):
    told = tmp_path / "told.zarr"
    looptap.capture(MODEL, ["abc"], told, quantities=("residual",), neurons=True)
    wanted = summarise(logit_moments(load_model(MODEL)))["blocks"]
    for target in (MODEL, told):
        ended = looptap_command("info", target, "--neurons")
        found = re.findall(r"^(\w+) (\d) +(\d+) +(\S+) +(\S+) +(\S+) +\S+ +\S+ +(\S+)", ended.stdout, re.M)
        assert ended.code == 0
        assert found == [
            (each["stage"], str(each["layer"]), str(each["num_neurons"]), f"{each['prediction']:.2%}",
             f"{each['suppression']:.2%}", f"{each['kurtosis'][0]:.2f}", f"{each['kurtosis'][-1]:.2f}")
            for each in wanted
        ]  # fmt: skip
    assert "prelude 0" not in looptap_command("info", MODEL).stdout
    ended = looptap_command("info", store, "--neurons")
    assert ended.code == 2 and "not asked for when the store was made" in ended.stderr


def test_info_of_a_model(looptap_command):
    ended = looptap_command("info", MODEL, "--recurrences", 5)
    said = rows(ended.stdout)
    assert ended.code == 0
    assert said["loop"].startswith(
        "(1,2x5,1)I: 4 blocks run 12 times; it starts from a draw of std 1, per sequence"
    )
    # a block: q, k, v, o of 32x32, three MLP matrices of 32x128, norms before and after both halves
    parameters = 2 * 256 * 32 + 4 * (4 * 32**2 + 3 * 32 * 128 + 4 * 32) + 32 * 64 + 32
    assert said["weights"].startswith(f"{parameters} parameters, ")
    assert re.search(rf"^residual_norm +{12 * 4} B ", ended.stdout, re.M)
    assert re.search(rf"^attention_peak +{12 * 2 * 4} B ", ended.stdout, re.M)
    assert re.search(r"^state +1\.5 KiB ", ended.stdout, re.M)  # 12 depths of 32 float32
    golden = Path(__file__).parent / "golden" / "olmo2"
    said = rows(looptap_command("info", golden, "--loop", "1-3x4").stdout)
    assert said["model"] == "olmo2" and said["loop"].startswith("(1,3x4,1): 5 blocks run 14 times")


@pytest.mark.slow
def test_a_reader_that_has_seen_enough():
    """A reader such as `looptap info MODEL | head -1` gets no message, and no success."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "looptap", "info", MODEL]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_inspect(looptap_command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ended = looptap_command("inspect", MODEL, "--prompt", "abcabc", "--recurrences", 4)
    assert ended.code == 0
    lines = ended.stdout.splitlines()
    assert "6 tokens" in lines[0] and "'c'" in lines[0]
    table = [line.split() for line in lines if re.match(r"\d ", line)]
    assert [row[0] for row in table] == ["0", "1", "2", "3"]
    dataset = looptap.capture(MODEL, ["abcabc"], recurrences=4).isel(token=5)
    block = dataset.isel(depth=(dataset.stage == 1).values & (dataset.layer == 1).values)
    steps, gaps = block.step_norm / block.residual_norm, block.gap_norm / block.residual_norm[-1]
    assert [row[1] for row in table] == ["-", *(f"{step:.1e}" for step in steps.values[1:])]
    assert [row[2] for row in table] == [f"{gap:.1e}" for gap in gaps.values]
    assert not any(tmp_path.iterdir())


HELP = [
    *([name] for name in ("capture", "status", "verify", "info", "analyze", "report", "inspect", "demo")),
    ["study"],
    ["bench"],
    *(["study", name] for name in ("architecture", "depth")),
    *(["bench", name] for name in ("analysis", "capture", "engine", "kernels", "load", "store", "watch")),
]


def help_of(*command: str) -> str:
    """Returns the help as a terminal of 80 columns gets it."""
    environment = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "looptap", *command, "--help"],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_help_names_every_command():
    assert re.findall(r"• (\w+) ", help_of()) == [names[0] for names in HELP if len(names) == 1]
    for group in ("study", "bench"):
        named = [names[1] for names in HELP if len(names) == 2 and names[0] == group]
        assert re.findall(r"• (\w+) ", help_of(group)) == named


@pytest.mark.parametrize("command", HELP, ids=" ".join)
@pytest.mark.slow
def test_help(command):
    """Fits 80 columns, and says something of every argument besides its default."""
    lines = help_of(*command).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    entries: dict[str, str] = {}
    name = None
    for line in lines:
        if match := re.match(r"│ ((?:-|[A-Z]{2})\S*.*?)(?: {2,}(.*))?│", line.replace(" │", "│").rstrip()):
            name, entries[match[1]] = match[1], match[2] or ""
        elif name is not None and line.startswith("│  "):
            entries[name] += " " + line.strip("│ ")
        else:
            name = None
    assert any(name.startswith("-h") for name in entries)
    for name, text in entries.items():
        said = re.sub(r"\((default:.*|required)\)", "", text)
        assert len(said.split()) >= 3, f"{name}: {text}"
    known = {
        "capture": CaptureSettings,
        "inspect": InspectSettings,
        "study architecture": ArchitectureStudySettings,
        "study depth": DepthStudySettings,
    }
    if settings := known.get(" ".join(command)):
        parts = [field.type for field in fields(settings) if is_dataclass(field.type)]
        num_settings = sum(len(fields(part)) for part in (settings, *parts)) - len(parts)
        assert len(entries) == num_settings + 1  # -h


def test_python_gives_what_the_command_gives(store, tmp_path):
    by_command = looptap.open(store)
    in_memory = looptap.capture(MODEL, TEXTS, **SETTINGS)
    on_disk = looptap.capture(MODEL, store.with_name("texts.jsonl"), tmp_path / "python.zarr", **SETTINGS)
    encoded = [list(text.encode()) for text in TEXTS]
    by_ids = looptap.capture(MODEL, encoded, tmp_path / "ids.zarr", **SETTINGS)
    for dataset in (in_memory, on_disk, by_ids):
        xr.testing.assert_equal(dataset, by_command)
    assert np.isfinite(by_command.residual_norm).sum() == NUM_TOKENS * 8
    assert sorted(by_command.sequence_id.values[by_command.sequence_length.values > 0]) == [0, 2, 3, 4]
    # the plan is the command's, so that either goes on with what the other began
    assert on_disk.attrs["plan"]["hash"] == by_command.attrs["plan"]["hash"]
    entry = (tmp_path / "ids.zarr" / ".looptap" / "ledger" / "0.json").read_bytes()
    xr.testing.assert_equal(looptap.capture(MODEL, encoded, tmp_path / "ids.zarr", **SETTINGS), by_command)
    assert (tmp_path / "ids.zarr" / ".looptap" / "ledger" / "0.json").read_bytes() == entry


def test_python_refuses_as_the_command_does(tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="row 1 holds the token id 999"):
        looptap.capture(MODEL, [[1], [999]], tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="lists of whole token ids"):
        looptap.capture(MODEL, [[0.5, 1.5]], tmp_path / "run.zarr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="holds no tokens"):
        looptap.capture(MODEL, [], tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        looptap.capture(MODEL, ["a"], tmp_path / "run.zarr", limit=0)
    assert sorted(tmp_path.iterdir()) == before
