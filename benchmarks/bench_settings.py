"""Settings of each benchmark, apart from what runs them, so that help loads nothing heavy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import RequestError

Part = Literal["writing", "reading", "protocol", "chaos"]


@dataclass(frozen=True, kw_only=True)
class AnalysisBench:
    """Time and memory of analysing a store, beside reading it once."""

    store: Annotated[Path | None, tyro.conf.arg(metavar="STORE")] = None
    """A store to analyse; one is made in a temporary directory if not given."""
    directory: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory for the temporary store."""
    gigabytes: float = 2.0
    """Size of the store that is made, GB of files."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "random:(10,10x32,10),width=72,heads=9"
    """Model of the store that is made; the default has the layers and heads of SmolLM2-135M with a loop."""
    quantities: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        "residual",
        "steps",
        "gaps",
        "attention",
        "lens",
    )
    """Quantities of the store that is made."""
    states: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SELECTION [SELECTION ...]")] = ()
    """States of the store that is made, as a capture takes them, of every token."""
    repeats: int = 3
    """Rounds, of which the median counts."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise RequestError(f"--repeats is {self.repeats}: give at least 1")
        if not self.gigabytes > 0:
            raise RequestError(f"--gigabytes is {self.gigabytes}: give a size above 0")
        _check_directory(self.directory)


@dataclass(frozen=True, kw_only=True)
class CaptureBench:
    """Time and memory of a capture as ratios to the same model's forward pass without a tap."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = (
        "random:(30,0,0),width=576,heads=9"
    )
    """Directory or spec; the default has about the shape of SmolLM2-135M."""
    loop: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LASTxTIMES")] = None
    """Repeat a window of a feedforward model's layers: first-lastxtimes."""
    sequences: int = 32
    """How many sequences are captured."""
    length: int = 512
    """Tokens of each."""
    rounds: int = 2
    """Times that every unit is gone through."""
    batch_tokens: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Most tokens in one forward pass; a capture's default if not given."""
    quantities: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Quantities and groups to measure; a capture's default if not given."""


@dataclass(frozen=True, kw_only=True)
class EngineBench:
    """Local processes and Ray actors whose units are sleeps: cost per unit, killed nodes, an estimate."""

    units: int = 600
    """Units without any work, to find the cost of one."""
    workers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="NUMBER [NUMBER ...]")] = (1, 2, 4, 8)
    """Numbers of workers whose units are sleeps."""
    sleep_ms: float = 100.0
    """Length of these sleeps, in milliseconds."""
    repeats: int = 3
    """Nodes that are killed, one after the other."""
    directory: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory on the disk whose ledger is measured; a temporary directory if not given."""

    def __post_init__(self) -> None:
        if self.units < 10 or self.repeats < 1 or not self.workers or min(self.workers) < 1:
            raise RequestError("--units must be at least 10, --repeats and --workers at least 1")
        _check_directory(self.directory)


@dataclass(frozen=True, kw_only=True)
class KernelsBench:
    """Time and memory of the kernels beside PyTorch's own operations, and the goals they are held to."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto takes a GPU if there is one."""
    model: str = "random:(30,0,0),width=576,heads=9"
    """Model of the whole forward pass on a CPU: a directory, Hub id or random: spec, feedforward or looped
    without a drawn initial state; the default has about the shape of SmolLM2-135M."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Tokens of the one sequence on a CPU."""
    rounds: int = 5
    """Times that every case is gone through."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise RequestError(f"lengths are {self.lengths}, but each must be at least 1 token")
        if self.rounds < 1:
            raise RequestError(f"rounds is {self.rounds}, but each case must be timed at least once")


@dataclass(frozen=True, kw_only=True)
class LoadBench:
    """Peak host memory of loading a checkpoint, beyond the model, as a ratio to its largest shard."""

    megabytes: int = 1000
    """About the size of the files, 10^6 bytes."""
    shards: int = 8
    """Files that the weights are in."""
    family: Literal["ouro", "llama"] = "ouro"
    """Layout of the checkpoint."""
    stored: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the files; they are loaded in it and in the other one."""


@dataclass(frozen=True, kw_only=True)
class StoreBench:
    """The store beside raw writing and mapping, zarr-python, zarrs and tensorstore."""

    parts: Annotated[tuple[Part, ...], tyro.conf.arg(metavar="PART [PART ...]")] = (
        "writing",
        "reading",
        "protocol",
        "chaos",
    )
    """What to measure: writing, reading, protocol, chaos."""
    directory: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory on the disk to measure; a temporary directory if not given."""
    repeats: int = 5
    """Rounds, of which the median counts."""
    megabytes: int = 1024
    """States of one write, and of the store that is read, in MiB."""
    kills: int = 20
    """Processes that the chaos part kills."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Sequences whose lengths show how much of a store is padding (S10); the demo's prompts if not given."""
    field: str = "text"
    """Field of a .jsonl that holds the text."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A tokenizer.json for it; bytes if not given."""

    def __post_init__(self) -> None:
        for name in ("repeats", "megabytes", "kills"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name} is {getattr(self, name)}: give at least 1")
        _check_directory(self.directory)


@dataclass(frozen=True, kw_only=True)
class WatchBench:
    """Agreement and cost of a watched transformers model and of our own, with the same weights."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory that transformers and looptap both read."""
    loop: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LASTxTIMES")] = None
    """Repeat a window of its layers: first-lastxtimes, for example 10-19x8."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Rows to run, as a capture reads them; random tokens if not given."""
    field: Annotated[str, tyro.conf.arg(metavar="NAME")] = "text"
    """Field of each .jsonl line that holds the text."""
    sequences: int = 8
    """How many rows."""
    length: int = 256
    """Tokens of each, if they are random."""
    rounds: int = 3
    """Times that each pass is timed."""


def _check_directory(path: Path | None) -> None:
    if path is not None and not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        raise RequestError(f"--directory {path} is no directory that can be written to")
