"""The plan as a store holds it: every writer of a store writes it, and every reader goes by it.

It is JSON, the attribute `plan` of the group and `.looptap/plan.json`; docs/store-format.md says every field.
Here it is a type, so that no author forgets a field and no reader asks for one that is not there. What is
unknown is None: a module that was watched shows neither its norms nor its vocabulary.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from ...errors import NoNeuronsError, StoreError


@dataclass(frozen=True, kw_only=True)
class StoredRotary:
    """Rotary positions, as `models.description.Rotary`."""

    theta: float
    interleaved: bool = False
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """One kind of block, as `models.description.Block`."""

    norm: str
    eps: float
    qk_norm: str | None = None
    bias: str | None = None
    rotary: StoredRotary


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """The captured model and the loop that it ran; fields are those of `models.description.Description`."""

    name: str
    """Name for people: of a directory, a Hub id, a spec, a watched module's class."""
    spec: str | None = None
    """A spec that finds the model again, anywhere, as far as there is one."""
    notation: str
    """(prelude, core x recurrences, coda), with I for injection."""
    norm: str
    """Places of the norms: pre, ouro, huginn, olmo2; unknown for a watched module."""
    prelude: int
    core: int
    recurrences: int
    coda: int
    width: int
    """Channels of the residual stream."""
    num_heads: int | None = None
    """Query heads; None where no attention was seen."""
    num_kv_heads: int | None = None
    head_width: int | None = None
    mlp_width: int | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    block: StoredBlock | None = None
    injection: str | None = None
    initial_state: str | None = None
    initial_std: float | None = None
    recurrence_end: str | None = None
    exit_gate: bool = False
    norm_before_coda: bool | None = None
    embedding_scale: float | None = None
    logit_scale: float | None = None
    tied_head: bool | None = None
    num_parameters: int
    weights_sha256: str | None = None
    """Hash over the weights; None where it is not known, which equals no other."""
    blocks: tuple[str, ...] | None = None
    """A watched module's blocks by name, in the order they ran."""
    neurons: dict[str, Any] | None = None
    """Summary of its neurons by `probes.neurons.summarise`, if it was asked for when the store was made."""

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> "StoredModel":
        """Makes the record of a model from its `ModelSource.identity`."""
        block = identity["block"]
        rotary = StoredRotary(**block["rotary"])
        return cls(**{**identity, "block": StoredBlock(**{**block, "rotary": rotary})})

    @property
    def is_random(self) -> bool:
        """Whether the model was drawn from a `random:` spec and never trained."""
        return (self.spec or self.name).startswith("random:")

    @property
    def is_watched(self) -> bool:
        """Whether the model is a watched module, of which only blocks and attention calls are known."""
        return self.norm == "unknown"

    @property
    def depth(self) -> int:
        """Block invocations of one forward pass."""
        return self.prelude + self.core * self.recurrences + self.coda


@dataclass(frozen=True, kw_only=True)
class StoredData:
    """The data that were captured."""

    name: str
    """Name of the file; "watched" for what a watched module was given."""
    sha256: str | None = None
    """SHA-256 of the file's bytes, or of the ids that were watched."""
    field: str | None = None
    """Field of a .jsonl that holds the text."""
    num_rows: int | None = None
    num_empty_rows: int | None = None
    """Rows without a token, which have no slots."""


@dataclass(frozen=True, kw_only=True)
class StoredTokenizer:
    """The tokenizer that made token ids of text."""

    name: str
    sha256: str | None = None
    """SHA-256 of its tokenizer.json, or over all of its files if there are more; None for plain bytes."""
    special_tokens: str | None = None
    """What was put around a text, none or bos; None for what the model's files say."""
    beginning: tuple[tuple[int, str], ...] | None = None
    """The first ids of the first row of text, each with its text; None where the data are token ids."""


@dataclass(frozen=True, kw_only=True)
class StoredSettings:
    """Settings that the captured numbers depend on; `looptap capture --help` explains it.

    `device`, `dtype`, `unit_tokens` and `batch_tokens` are what "auto" and None came to.
    """

    field: str = "text"
    limit: int | None = None
    loop: str | None = None
    recurrences: int | None = None
    quantities: tuple[str, ...]
    states: tuple[str, ...] = ()
    state_codec: str = "none"
    tokens: str = "all"
    sink_tokens: int = 1
    initial_state: str | dict[str, str] | None = None
    """A word of `--initial-state`, or file and sha256 of the states that were read."""
    prelude_output: str = "model"
    zero: tuple[str, ...] = ()
    neurons: bool = False
    dtype: str
    device: str
    seed: int = 0
    unit_tokens: int | None = None
    batch_tokens: int | None = None
    gap_memory_gib: float | None = None

    @property
    def looped_layers(self) -> tuple[int, int] | None:
        """First and last layer of a feedforward model that were made a loop, both included."""
        match = re.match(r"(\d+)-(\d+)x", self.loop or "")
        return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """The plan of a store: all that was settled before its capture ran."""

    model: StoredModel
    data: StoredData
    tokenizer: StoredTokenizer | None = None
    """The tokenizer; None where the data are token ids."""
    settings: StoredSettings
    num_sequences: int
    """Rows of the data that have a token."""
    num_tokens: int
    num_units: int
    unit_tokens: int
    """Token slots of a unit."""
    unit_sequences: int
    """Sequence slots of a unit."""
    num_state_rows: int | None = None
    """State slots of a unit; None where states stand on the token axis itself, or none are kept."""
    gap_method: str | None = None
    """How gaps were measured: keep states, or run twice; None without them."""
    dtype: str
    """Dtype that the model ran in."""
    backend: str
    """Backend that measured: pytorch or triton."""
    versions: dict[str, str] = field(default_factory=dict)
    """Python and the packages that numbers depend on, when the store was made."""
    created: str | None = None
    """Time at which the store was made, ISO 8601, UTC."""
    recorded_hash: str | None = None
    """The hash that a store holds, which may be of fields that this looptap does not know."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = "the plan") -> "StoredPlan":
        """Reads the plan from a store's attribute `plan`.

        Args:
            where: begins the message of the error.
        Raises:
            StoreError: a field is missing or of another type; names it.
        """
        known = dict(document)
        known["recorded_hash"] = known.pop("hash", None)
        known["tokenizer"] = known.get("tokenizer") or None
        try:
            return msgspec.convert(known, cls)
        except msgspec.ValidationError as error:
            raise StoreError(f"{where} is not as looptap writes it: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Returns what a store holds: JSON's own types, with the hash."""
        document = self._hashed()
        if self.model.neurons is not None:
            document["model"]["neurons"] = self.model.neurons
        if self.tokenizer is not None and self.tokenizer.beginning:
            document["tokenizer"]["beginning"] = [list(each) for each in self.tokenizer.beginning]
        return document | {"hash": self.hash, "versions": self.versions, "created": self.created}

    @property
    def hash(self) -> str:
        """SHA-256 over all fields but itself, versions, created, neurons, and how rows begin."""
        if self.recorded_hash is not None:
            return self.recorded_hash
        return hashlib.sha256(json.dumps(self._hashed(), sort_keys=True).encode()).hexdigest()

    def unit_rows(self, axis: str) -> int:
        """Returns the slots of one unit along token, sequence, token_state or unit.

        Raises:
            KeyError: units do not share this axis.
        """
        rows = {"token": self.unit_tokens, "sequence": self.unit_sequences, "unit": 1}
        if self.num_state_rows is not None:
            rows["token_state"] = self.num_state_rows
        return rows[axis]

    def recorded_neurons(self) -> dict[str, Any]:
        """Returns shares and kurtosis by block, as `probes.neurons.summarise` gave them when the store was
        made.

        Raises:
            NoNeuronsError: none were recorded; says why.
        """
        if self.model.neurons is not None:
            return self.model.neurons
        if self.model.is_watched:
            raise NoNeuronsError(
                "the module was watched: which of its weights an MLP writes with, and which are its head, "
                "cannot be seen from outside"
            )
        raise NoNeuronsError(
            "not asked for when the store was made: capture into a new store with --neurons, or see the "
            "model's with looptap info MODEL --neurons"
        )

    def _hashed(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        for name in ("versions", "created", "recorded_hash"):
            del document[name]
        document["tokenizer"] = tokenizer = document["tokenizer"] or {}
        tokenizer.pop("beginning", None)
        if tokenizer.get("special_tokens", "") is None:
            del tokenizer["special_tokens"]
        del document["model"]["neurons"]
        if self.model.blocks is None:
            del document["model"]["blocks"]
        return document


def plan_of(dataset: Any) -> StoredPlan:
    """Returns the plan of a store's Dataset, from its attribute `plan`."""
    return StoredPlan.from_json(dataset.attrs["plan"])


def plan_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns the differences of two plans' documents, as lines "settings.seed: 0 -> 1" (stored -> wanted).

    `versions` and `created` may differ between runs of one plan; `hash` follows from the rest, and so do
    what the plan tells of the model's neurons and of how rows begin, taken when the store is made.
    """
    old, new = _flatten(stored), _flatten(wanted)
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in dict.fromkeys([*old, *new])
        if name.split(".")[0] not in ("versions", "created", "hash")
        and not name.startswith("model.neurons.")
        and name != "tokenizer.beginning"
        and (name not in old or name not in new or old[name] != new[name])
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat = {}
    for name, part in value.items():
        flat |= _flatten(part, f"{prefix}.{name}".strip("."))
    return flat
