"""The plan: a dataset, a model and settings, resolved once into units, before anything runs.

Sequences are ordered by length, longest first, so that neighbours in a batch are of one length and the work
of a unit hardly varies; then they fill units of a fixed number of token slots, whole. The same inputs always
give the same units. A worker reads what it needs from the store that the plan made, so a plan never travels.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np

from .data import Dataset, check_rows, open_tokenizer, read_dataset
from .models.description import STAGES, Description
from .models.load import ModelSource, find_model
from .selection import select_depths, select_tokens
from .settings import CaptureSettings
from .store.layout import ArraySpec, Coordinate
from .store.quantities import QUANTITIES, resolve_quantities

DEFAULT_UNIT_TOKENS = 4096
_RUNTIME_BYTES = 350 << 20  # python, torch and zarr before a model is loaded, measured


class PlanError(ValueError):
    """Settings that do not fit the data or the model."""


@dataclass(frozen=True)
class Plan:
    """What will be captured, and where each token goes."""

    settings: CaptureSettings
    source: ModelSource
    dataset: Dataset
    quantities: tuple[str, ...]
    state_depths: tuple[int, ...]
    device: str
    dtype: str
    unit_tokens: int
    units: tuple[tuple[int, ...], ...]
    """Rows of the data in each unit, in the order they stand there."""
    tokenizer: dict[str, Any]

    @property
    def description(self) -> Description:
        return self.source.description

    @property
    def num_units(self) -> int:
        return len(self.units)

    @property
    def num_sequences(self) -> int:
        return sum(map(len, self.units))

    @property
    def unit_sequences(self) -> int:
        """Sequence slots of a unit: the most that any unit holds."""
        return max(map(len, self.units))

    @cached_property
    def kept_positions(self) -> dict[int, np.ndarray]:
        """By row of the data: positions whose states are kept."""
        rows, seed = self.dataset.rows, self.settings.seed
        tokens = self.settings.tokens
        return {row: select_tokens(tokens, seed, row, len(rows[row])) for unit in self.units for row in unit}

    @cached_property
    def unit_state_rows(self) -> int:
        """State slots of a unit; its token slots where every token's state is kept."""
        if self.settings.tokens == "all":
            return self.unit_tokens
        return max(1, *(sum(len(self.kept_positions[row]) for row in unit) for unit in self.units))

    @property
    def kept_bytes(self) -> int:
        """Memory of the core's states at all recurrences of one batch, which the gaps wait for."""
        d = self.description
        return self._longest_batch * d.core * d.recurrences * d.width * self._itemsize

    @property
    def gap_method(self) -> str | None:
        """How the gaps get the last recurrence's states; None where there are no gaps to measure."""
        if not self.description.core or not any(name.startswith("gap_") for name in self.quantities):
            return None
        fits = self.kept_bytes <= self.settings.gap_memory_gib * 2**30
        return "keep states" if fits else "run twice"

    @property
    def memory_bytes(self) -> int:
        """An estimate of the peak: runtime, weights, one unit's results twice (as measured and as written),
        one batch.
        """
        d = self.description
        batch = self._longest_batch * (8 * d.width + 4 * d.mlp_width) * self._itemsize
        if self.gap_method == "keep states":
            batch += self.kept_bytes
        elif self.gap_method == "run twice":
            batch += self.kept_bytes // d.recurrences
        weights = self.source.num_parameters * self._itemsize
        return _RUNTIME_BYTES + weights + 2 * self.disk_bytes // self.num_units + batch

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of all units' arrays before compression, which statistics shrink a little by."""
        specs = self.arrays().values()
        return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)

    @property
    def batch_tokens(self) -> int:
        """The setting, or the device's default."""
        # on two cores 512 tokens ran as fast as 2048 within 3 %, and keep a quarter of the loop for the gaps
        return self.settings.batch_tokens or (512 if self.device == "cpu" else 16_384)

    @property
    def _longest_batch(self) -> int:
        """Most tokens that one forward pass will see."""
        longest = max(map(len, self.dataset.rows))
        return min(self.unit_tokens, self.dataset.num_tokens, max(self.batch_tokens, longest))

    @property
    def _itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def arrays(self) -> dict[str, ArraySpec]:
        """The store's arrays that units fill."""
        d = self.description
        sizes = {
            "depth": d.depth,
            "head": d.num_heads,
            "hidden": d.width,
            "depth_state": len(self.state_depths),
        }
        specs = {}
        for name in self.quantities:
            quantity = QUANTITIES[name]
            dimensions, unit_rows = quantity.axes, self.unit_tokens
            attributes = {"long_name": quantity.definition, "units": quantity.unit}
            dtype = "float32"
            if name == "state":
                unit_rows = self.unit_state_rows
                if self.settings.tokens != "all":
                    dimensions = ("token_state", *dimensions[1:])
                if self.dtype == "bfloat16":
                    dtype = "uint16"
                    attributes |= {"bits_of": "bfloat16", "how_to_read": "array.view(ml_dtypes.bfloat16)"}
                elif self.dtype == "float16":
                    dtype = "float16"
            shape = (self.num_units * unit_rows, *(sizes[axis] for axis in dimensions[1:]))
            specs[name] = ArraySpec(
                dimensions, shape, unit_rows, dtype, attributes, compressed=name != "state"
            )
        return specs

    def coordinates(self) -> dict[str, Coordinate]:
        """All that is known of every slot before the capture."""
        return {**_depth_coordinates(self.description), **self._slot_coordinates()}

    def _slot_coordinates(self) -> dict[str, Coordinate]:
        U, C, Q = self.num_units, self.unit_tokens, self.unit_sequences
        token_id, position, owner = (np.full(U * C, -1, np.int32) for _ in range(3))
        start, sequence_id = (np.full(U * Q, -1, np.int64) for _ in range(2))
        length = np.zeros(U * Q, np.int32)
        state_token = np.full(U * self.unit_state_rows, -1, np.int64)
        for u, rows in enumerate(self.units):
            slot, state_slot = u * C, u * self.unit_state_rows
            for q, row in enumerate(rows, start=u * Q):
                ids = self.dataset.rows[row]
                here = slice(slot, slot + len(ids))
                token_id[here], position[here], owner[here] = ids, np.arange(len(ids)), q
                start[q], length[q], sequence_id[q] = slot, len(ids), row
                if "state" in self.quantities and self.settings.tokens != "all":
                    kept = self.kept_positions[row]
                    state_token[state_slot : state_slot + len(kept)] = slot + kept
                    state_slot += len(kept)
                slot += len(ids)
        token, sequence = ("token",), ("sequence",)
        found: dict[str, Coordinate] = {
            "token_id": (token, token_id, {"long_name": "token id; -1 in empty slots"}),
            "token_position": (
                token,
                position,
                {"long_name": "place in its sequence, from 0; -1 in empty slots"},
            ),
            "token_sequence": (token, owner, {"long_name": "index on the sequence axis; -1 in empty slots"}),
            "sequence_start": (sequence, start, {"long_name": "first token slot; -1 in empty slots"}),
            "sequence_length": (sequence, length, {"long_name": "tokens; 0 in empty slots"}),
            "sequence_id": (
                sequence,
                sequence_id,
                {"long_name": "row number in the data; -1 in empty slots"},
            ),
        }
        if "state" in self.quantities:
            depths = np.array(self.state_depths, np.int32)
            found["state_depth"] = (("depth_state",), depths, {"long_name": "depth of each kept state"})
            if self.settings.tokens != "all":
                attributes = {"long_name": "token slot of each kept state; -1 in empty slots"}
                found["state_token"] = (("token_state",), state_token, attributes)
        return found

    def document(self) -> dict[str, Any]:
        """The plan as the store records it; `hash` is over everything but `versions` and `created`."""
        settings = asdict(self.settings)
        for name in ("model", "data", "store"):  # paths of one machine; what they hold is recorded instead
            del settings[name]
        settings |= {"quantities": list(self.quantities), "states": list(self.settings.states)}
        settings |= {"device": self.device, "dtype": self.dtype}
        settings |= {"unit_tokens": self.unit_tokens, "batch_tokens": self.batch_tokens}
        plan: dict[str, Any] = {
            "model": self.source.identity(),
            "data": self.dataset.identity,
            "tokenizer": self.tokenizer,
            "settings": settings,
            "num_sequences": self.num_sequences,
            "num_tokens": self.dataset.num_tokens,
            "num_units": self.num_units,
            "unit_tokens": self.unit_tokens,
            "unit_sequences": self.unit_sequences,
            "num_state_rows": None if self.settings.tokens == "all" else self.unit_state_rows,
            "gap_method": self.gap_method,
            "dtype": self.dtype,
            "backend": "pytorch",
        }
        plan["hash"] = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        plan["versions"] = versions()
        plan["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        return plan


def make_plan(settings: CaptureSettings) -> Plan:
    """Checks everything that can be checked before work begins, and lays out the units.

    Raises:
        ModelError, DataError, PlanError, ValueError: a user's mistake; nothing was written.
    """
    settings.check()
    source = find_model(settings.model, settings.loop, settings.recurrences)
    names = [name for text in settings.quantities for name in text.split(",")]
    names += ["state"] if settings.states else []
    quantities = resolve_quantities(names)
    if "state" in quantities and not settings.states:
        raise PlanError("the quantity state needs --states, for example --states core[all]@last")
    state_depths = select_depths(settings.states, source.description)
    select_tokens(settings.tokens, 0, 0, 1)  # its form, checked before the data is read
    is_text_model = source.origin.tokenizer_path is not None or settings.model.startswith("random:")
    tokenizer = open_tokenizer(source.origin.tokenizer_path) if is_text_model else None
    dataset = read_dataset(settings.data, tokenizer, field=settings.field, limit=settings.limit)
    check_rows(dataset, source.description.vocab_size, source.description.max_positions)
    unit_tokens = _unit_tokens(settings.unit_tokens, dataset)
    return Plan(
        settings=settings,
        source=source,
        dataset=dataset,
        quantities=quantities,
        state_depths=state_depths,
        device=resolve_device(settings.device),
        dtype=source.resolve_dtype(settings.dtype),
        unit_tokens=unit_tokens,
        units=tuple(pack([len(row) for row in dataset.rows], unit_tokens)),
        tokenizer={"name": tokenizer.name, "sha256": tokenizer.sha256} if tokenizer else {},
    )


def pack(lengths: list[int], unit_tokens: int) -> Iterator[tuple[int, ...]]:
    """Fills units with whole sequences, longest first, next fit; empty ones get no slot.

    With sequences ordered by length a unit wastes less than its shortest sequence, half of it on average.
    """
    order = sorted(
        (row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], row)
    )
    unit: list[int] = []
    used = 0
    for row in order:
        if used + lengths[row] > unit_tokens:
            yield tuple(unit)
            unit, used = [], 0
        unit.append(row)
        used += lengths[row]
    yield tuple(unit)


def resolve_device(device: str) -> str:
    """The device that "auto" stands for here.

    Raises:
        PlanError: a GPU is asked for and torch sees none of that number.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise PlanError(f"device {device!r} is not known; use cpu, cuda or cuda:NUMBER")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"device {device} is not there; torch sees {torch.cuda.device_count()} GPUs")
    return device


def versions() -> dict[str, str]:
    """What ran, for a plan and for receipts."""
    from importlib.metadata import version

    names = ("looptap", "torch", "numpy", "zarr", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _unit_tokens(wanted: int | None, dataset: Dataset) -> int:
    row, longest = max(enumerate(map(len, dataset.rows)), key=lambda pair: pair[1])
    if wanted is None:
        return max(DEFAULT_UNIT_TOKENS, -(-longest // 512) * 512)
    if longest > wanted:
        raise PlanError(
            f"row {row} has {longest} tokens and a unit of {wanted} slots holds whole sequences only; "
            f"give --unit-tokens {longest} or more"
        )
    return wanted


def _depth_coordinates(description: Description) -> dict[str, Coordinate]:
    steps = list(description.steps())
    depth = ("depth",)
    stage = np.array([STAGES.index(step.stage) for step in steps], np.int8)
    flags = {"flag_values": [0, 1, 2], "flag_meanings": " ".join(STAGES)}
    layer = np.array([step.layer for step in steps], np.int16)
    recurrence = np.array([step.recurrence for step in steps], np.int16)
    return {
        "depth": (
            depth,
            np.arange(len(steps), dtype=np.int32),
            {"long_name": "block invocation, in running order"},
        ),
        "stage": (depth, stage, {"long_name": "part of the model", **flags}),
        "layer": (depth, layer, {"long_name": "place of the block in its stage, from 0"}),
        "recurrence": (
            depth,
            recurrence,
            {"long_name": "pass through the core, from 0; -1 outside the core"},
        ),
    }
