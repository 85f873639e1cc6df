"""Settings of a user. The command line is made from these classes.

A setting that several commands have is written once, in a part that they share; or, where a command has that
one setting of a part, as a type with its help.
"""

import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin, get_type_hints

import tyro

from ..errors import RequestError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Device = Annotated[
    str, tyro.conf.arg(metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
]
TextField = Annotated[
    str, tyro.conf.arg(metavar="NAME", help="Field of each .jsonl line that holds the text.")
]
SpecialTokens = Annotated[
    Literal["model", "none", "bos"],
    tyro.conf.arg(
        metavar="model|none|bos",
        help="Around each text: what the model's tokenizer puts there, nothing, or the token that begins a "
        "sequence, once.",
    ),
]
BatchTokens = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="TOKENS",
        help="Most tokens in one forward pass; by default 512 on a CPU and 16384 on a GPU.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The model, and how it runs."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory with config.json and safetensors, a Hub id such as ORG/NAME or ORG/NAME@REVISION, or a spec
    such as random:(0,12x32,0)I,norm=pre."""
    dtype: Dtype = "auto"
    """The model runs in this; auto is what its files hold."""
    device: Device = "auto"
    loop: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LASTxTIMES")] = None
    """Repeat a window of a feedforward model's layers: first-lastxtimes, for example 10-19x8."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(CheckpointSettings):
    """The model, and how it runs."""

    recurrences: Annotated[int | None, tyro.conf.arg(metavar="TIMES")] = None
    """Passes through the core; the model's own number if not given."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What the model reads."""

    data: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """.jsonl (with --field), .txt (a document a line), token ids as .npy [S, T] or .safetensors."""
    field: TextField = "text"
    limit: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Only the first so many rows of the data."""
    special_tokens: SpecialTokens = "model"


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What is recorded, and what is changed in the model."""

    quantities: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        "residual",
        "steps",
        "gaps",
        "attention",
        "exit",
    )
    """Names of quantities, or the groups residual, steps, gaps, attention, distances, lens, exit, all; with
    spaces or commas. A group leaves out what the model does not have. distances compares whole sequences and
    costs most."""
    states: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SELECTION [SELECTION ...]")] = ()
    """Keep residuals too: all, or STAGE[LAYERS]@RECURRENCES such as core[-1]@0,1,last and core[all]@last."""
    state_codec: Literal["none", "lossless"] = "none"
    """How states are stored: bare, which is quickest to write and read, or losslessly compressed by about a
    fifth, for slow disks and networks."""
    tokens: Annotated[str, tyro.conf.arg(metavar="SELECTION")] = "all"
    """Tokens with kept states: all, last (of each sequence), every:8 (positions), sample:0.05 (a share)."""
    sink_tokens: Annotated[int, tyro.conf.arg(metavar="TOKENS")] = 1
    """First keys of a sequence that count as the attention sink."""
    initial_state: Annotated[str | None, tyro.conf.arg(metavar="HOW-or-FILE")] = None
    """What enters the first recurrence: random (a draw for every sequence and position, as models with a
    drawn state do by themselves), fixed (the same draw for every sequence), zero, or a .safetensors file with
    input_states [S, T, D], a row for each row of the data."""
    prelude_output: Literal["model", "fixed", "random"] = "model"
    """What the loop gets of the prelude: its output, or for every token a vector of that norm in a random
    direction: fixed (by position, the same in every sequence) or random (of its own)."""
    zero: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SELECTION [SELECTION ...]")] = ()
    """Set outputs to zero: mlp or attention of blocks selected as for --states, such as mlp:core[1] or
    attention:core[all]@0."""
    neurons: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also tell prediction and suppression neurons of every block, from the weights alone, when the store is
    made."""
    seed: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0
    """Seed of drawn initial states, replaced prelude outputs and token samples."""
    unit_tokens: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Token slots of one unit, which is committed as one; by default 4096 or the longest sequence."""
    batch_tokens: BatchTokens = None
    gap_memory_gib: Annotated[float, tyro.conf.arg(metavar="GIB")] = 2.0
    """Memory that kept states may take for the gaps and the lens, GiB; past it the loop is run twice instead.
    Maps of all pairs of blocks may take as much again, and past it fewer tokens run at once."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The store and the workers; the workers may be others each time that a capture goes on."""

    store: Annotated[str | Path, tyro.conf.arg(metavar="PATH")]
    """Directory of the Zarr store to write or to go on with, or s3://bucket/prefix."""
    engine: Literal["local", "ray"] = "local"
    """Workers run on this machine, or in a Ray cluster, one on each GPU (on CPUs one on each node)."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="NUMBER")] = None
    """Most workers. With the local engine so many processes, a GPU each or a share of the cores; if not given
    one in this process. With Ray as many as there is room for, if not given."""
    ray_address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of the Ray cluster; RAY_ADDRESS if not given, and without either a cluster on this machine
    alone."""
    unit_limit_s: Annotated[float | None, tyro.conf.arg(metavar="SECONDS")] = None
    """A worker whose unit takes longer, in seconds, is killed; needs workers that are not in this process."""
    worker_wait_s: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
    """How long, in seconds, to wait for a worker while a cluster has room for none."""


@dataclass(frozen=True, kw_only=True)
class _OfParts:
    """Settings in parts, each of which can also be given by its name alone, as on a command line."""

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Puts settings into the parts that have them.

        Raises:
            TypeError: there is no setting of such a name, or one without a default is not given.
        """
        parts = {}
        for part in fields(cls):
            if isinstance(kind := part.type, type) and is_dataclass(kind):
                names = settings.keys() & {field.name for field in fields(kind)}
                parts[part.name] = kind(**_taken(kind, {name: settings.pop(name) for name in names}))
        return cls(**parts, **_taken(cls, settings))

    def but(self, **changes: Any) -> Self:
        """Returns the same settings with some of them changed; names and errors are those of `of`."""
        known: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            known |= vars(value) if is_dataclass(value) else {each.name: value}
        return self.of(**(known | changes))


def _taken(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as their fields have them, where one value or another sequence was given for a tuple,
    or a path for text.
    """
    hints, taken = get_type_hints(kind), {}
    for name, value in given.items():
        if get_origin(hints.get(name)) is tuple and value is not None:
            value = (value,) if isinstance(value, str | int | float) else tuple(value)
        if hints.get(name) in (str, str | None) and isinstance(value, os.PathLike):
            value = os.fspath(value)
        taken[name] = value
    return taken


@dataclass(frozen=True, kw_only=True)
class CaptureSettings(_OfParts):
    """Run a model over a dataset and record what happens inside its loop; the same command resumes."""

    model: ModelSettings
    data: DataSettings
    measure: MeasureSettings = MeasureSettings()
    run: RunSettings

    def check(self) -> None:
        """Checks every number's range.

        Called by the plan: raised while the command line is parsed, the message would be buried in another.

        Raises:
            RequestError: a number is out of its range, or two settings exclude each other.
        """
        _check_counts(self.data, "limit")
        _check_counts(self.model, "recurrences")
        _check_counts(self.measure, "unit_tokens", "batch_tokens", "sink_tokens")
        _check_counts(self.run, "workers")
        measure, run = self.measure, self.run
        if not 0 <= measure.seed < 2**63:
            raise RequestError(f"seed must be from 0 to 2**63 - 1, got {measure.seed}")
        if not 0 <= measure.gap_memory_gib < float("inf"):
            raise RequestError(f"gap_memory_gib must be a number from 0, got {measure.gap_memory_gib}")
        for name in ("unit_limit_s", "worker_wait_s"):
            value = getattr(run, name)
            if value is not None and not value > 0:
                raise RequestError(f"{name} must be above 0 seconds, got {value}")
        if run.engine != "ray" and run.ray_address is not None:
            raise RequestError(f"ray_address {run.ray_address} is for --engine ray, which was not given")
        if run.engine == "local" and run.workers is None and run.unit_limit_s is not None:
            raise RequestError("unit_limit_s needs workers that can be killed: give --workers 1 or more")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(_OfParts):
    """Run one short prompt and look inside."""

    model: ModelSettings
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """The text to run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """HTML page with attention maps and the trajectory."""
    seed: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0
    """Seed of drawn initial states."""
    map_memory_gib: Annotated[float, tyro.conf.arg(metavar="GIB")] = 1.0
    """Most memory that attention maps may take, GiB; a prompt that needs more is refused."""
    contraction_recurrences: Annotated[int, tyro.conf.arg(metavar="TIMES")] = 128
    """Recurrences after which the loop's contraction factor is taken, whatever --recurrences says; 0 leaves
    it out."""


@dataclass(frozen=True, kw_only=True)
class DepthStudySettings(_OfParts):
    """Capture a checkpoint at many test-time recurrence counts and compare them; the same command goes on."""

    model: CheckpointSettings
    data: DataSettings
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory for the stores, one a count, the tables, the figures and report.html."""
    counts: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TIMES [TIMES ...]")] = ()
    """Recurrence counts, each once; powers of two up to four times the model's own if not given. The model's
    own is always among them, as what the others are compared with. With --loop its TIMES is the model's own,
    and x1 the feedforward model as it was trained."""
    seed: Annotated[int, tyro.conf.arg(metavar="SEED")] = 0
    """Seed of drawn initial states, which are the same for every count."""
    batch_tokens: BatchTokens = None


@dataclass(frozen=True, kw_only=True)
class ArchitectureStudySettings:
    """Capture randomly initialised loops of every combination; the same command goes on where it stopped."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory for the stores, one a combination and seed, the tables, the figures and report.html."""
    norms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NORM [NORM ...]")] = ("pre", "huginn", "ouro")
    """Places of the norms: pre, huginn, ouro or olmo2. This and the next seven are the axes of the study,
    which is their product; defaults are those of the paper's section 4.2."""
    injection: Annotated[tuple[Literal["yes", "no"], ...], tyro.conf.arg(metavar="yes|no [yes|no]")] = (
        "yes",
        "no",
    )
    """Whether every recurrence is given the embeddings, and starts from a drawn state."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="LAYERS [LAYERS ...]")] = (4, 12, 16)
    """Layers of the core; there is no prelude and no coda."""
    recurrences: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TIMES [TIMES ...]")] = (128,)
    """Passes through the core, at least 2."""
    widths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="CHANNELS [CHANNELS ...]")] = (256,)
    """Channels of the residual stream."""
    gains: Annotated[tuple[float, ...], tyro.conf.arg(metavar="GAIN [GAIN ...]")] = (0.32,)
    """Standard deviation of every matrix but the embeddings, times the square root of the width."""
    embedding_stds: Annotated[tuple[float, ...], tyro.conf.arg(metavar="STD [STD ...]")] = (1.0,)
    """Standard deviation of the embeddings."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (0, 1, 2)
    """Seeds of the weights, and of the drawn initial states."""
    head_width: Annotated[int, tyro.conf.arg(metavar="CHANNELS")] = 64
    """Channels of an attention head, the same for every width; a smaller width has one head."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """.jsonl (with --field), .txt (a document a line), token ids as .npy [S, T] or .safetensors; prompts that
    come with looptap if not given."""
    field: TextField = "text"
    limit: Annotated[int, tyro.conf.arg(metavar="ROWS")] = 4
    """Only the first so many rows of the data."""
    device: Device = "auto"
    batch_tokens: BatchTokens = None


def _check_counts(part: Any, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}")
        if value is not None and value > 2**62:
            raise RequestError(f"{name} must be at most 2**62, got {value}")
