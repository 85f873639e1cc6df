"""Layout of a store: which rows share a unit, which slot each token gets, and the shape of every array.

Sequences are ordered by length, longest first, so that neighbours in a batch are of one length and the work
of a unit hardly varies; then they fill units of a fixed number of token slots, whole. The same lengths always
give the same units.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .models.loop_schedule import STAGES, Step
from .store.layout import ArraySpec, Codec, Coordinate
from .store.quantities import BITS, QUANTITIES

DEFAULT_UNIT_TOKENS = 4096


def pack(lengths: Sequence[int], unit_tokens: int) -> Iterator[tuple[int, ...]]:
    """Yields units of whole sequences, longest first, next fit; empty sequences get no slot.

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


def default_unit_tokens(lengths: Sequence[int]) -> int:
    """Slots of a unit that hold the longest sequence."""
    return max(DEFAULT_UNIT_TOKENS, -(-max(lengths) // 512) * 512)


@dataclass(frozen=True)
class Slots:
    """The slots of all tokens: which row is in which unit, and at which place."""

    rows: Sequence[np.ndarray]
    """Token ids of every row of the data, int32; empty rows have no slots."""
    units: tuple[tuple[int, ...], ...]
    """Rows in each unit, in the order they stand there."""
    unit_tokens: int
    kept_positions: Mapping[int, np.ndarray] | None = None
    """Positions whose states are kept, by row, int64; None where states stand on the token axis itself."""

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
    def unit_state_rows(self) -> int:
        """State slots of a unit; its token slots where every token's state is kept."""
        if (kept := self.kept_positions) is None:
            return self.unit_tokens
        return max(1, *(sum(len(kept[row]) for row in unit) for unit in self.units))

    def facts(self) -> dict[str, Any]:
        """Returns what a store's plan records of its layout: the fields of StoredPlan of these names."""
        return {
            "num_sequences": self.num_sequences,
            "num_tokens": sum(map(len, self.rows)),
            "num_units": self.num_units,
            "unit_tokens": self.unit_tokens,
            "unit_sequences": self.unit_sequences,
            "num_state_rows": None if self.kept_positions is None else self.unit_state_rows,
        }

    def coordinates(self) -> dict[str, Coordinate]:
        """Returns what is known, before a capture, of every slot of token, sequence and token_state axes."""
        U, C, Q = self.num_units, self.unit_tokens, self.unit_sequences
        token_id, position, owner = (np.full(U * C, -1, np.int32) for _ in range(3))
        start, sequence_id = (np.full(U * Q, -1, np.int64) for _ in range(2))
        length = np.zeros(U * Q, np.int32)
        state_token = np.full(U * self.unit_state_rows, -1, np.int64)
        for u, rows in enumerate(self.units):
            slot, state_slot = u * C, u * self.unit_state_rows
            for q, row in enumerate(rows, start=u * Q):
                ids = self.rows[row]
                here = slice(slot, slot + len(ids))
                token_id[here], position[here], owner[here] = ids, np.arange(len(ids)), q
                start[q], length[q], sequence_id[q] = slot, len(ids), row
                if self.kept_positions is not None:
                    kept = self.kept_positions[row]
                    state_token[state_slot : state_slot + len(kept)] = slot + kept
                    state_slot += len(kept)
                slot += len(ids)
        found = {
            "token_id": ("token", token_id, "token id; -1 in empty slots"),
            "token_position": ("token", position, "place in its sequence, from 0; -1 in empty slots"),
            "token_sequence": ("token", owner, "index on the sequence axis; -1 in empty slots"),
            "sequence_start": ("sequence", start, "first token slot; -1 in empty slots"),
            "sequence_length": ("sequence", length, "tokens; 0 in empty slots"),
            "sequence_id": ("sequence", sequence_id, "row number in the data; -1 in empty slots"),
        }
        if self.kept_positions is not None:
            meaning = "token slot of each kept state; -1 in empty slots"
            found["state_token"] = ("token_state", state_token, meaning)
        return {name: ((axis,), values, {"long_name": text}) for name, (axis, values, text) in found.items()}


def depth_coordinates(
    steps: Sequence[Step], state_depths: Sequence[int] | None, *, has_pairs: bool = False
) -> dict[str, Coordinate]:
    """Returns the place of each depth in the loop, the depths of kept states (None: no states), and the
    second axis of pairs of depths if there are any.
    """
    names = list(dict.fromkeys([*STAGES, *(step.stage for step in steps)]))
    stages = {"flag_values": list(range(len(names))), "flag_meanings": " ".join(names)}
    texts = {
        "depth": "block invocation, in running order",
        "stage": "part of the model",
        "layer": "place of the block in its stage, from 0",
        "recurrence": "pass through the core, from 0; -1 outside the core",
    }
    values = {
        "depth": np.arange(len(steps), dtype=np.int32),
        "stage": np.array([names.index(step.stage) for step in steps], np.int8),
        "layer": np.array([step.layer for step in steps], np.int16),
        "recurrence": np.array([step.recurrence for step in steps], np.int16),
    }
    found: dict[str, Coordinate] = {
        name: (("depth",), values[name], {"long_name": text} | (stages if name == "stage" else {}))
        for name, text in texts.items()
    }
    if has_pairs:
        found["depth_other"] = (("depth_other",), values["depth"], {"long_name": "depth of the other block"})
    if state_depths is not None:
        depths = np.array(state_depths, np.int32)
        found["state_depth"] = (("depth_state",), depths, {"long_name": "depth of each kept state"})
    return found


def array_specs(
    quantities: Sequence[str],
    slots: Slots,
    sizes: Mapping[str, int],
    state_dtype: str,
    state_codec: Codec = "none",
) -> dict[str, ArraySpec]:
    """Returns the arrays that units fill.

    Args:
        quantities: their names, in the store's order.
        sizes: size of every axis but the first: depth, depth_other, recurrence, head, hidden, depth_state.
        state_dtype: the model's: float32, bfloat16 (kept as its bits) or float16.
        state_codec: "none" or "lossless".
    """
    specs = {}
    for name in quantities:
        quantity = QUANTITIES[name]
        dimensions, dtype = quantity.axes, quantity.dtype
        unit_rows = slots.unit_sequences if dimensions[0] == "sequence" else slots.unit_tokens
        attributes = {"long_name": quantity.definition, "units": quantity.unit}
        if name == "state":
            unit_rows, dtype = slots.unit_state_rows, state_dtype
            if slots.kept_positions is not None:
                dimensions = ("token_state", *dimensions[1:])
            if state_dtype == "bfloat16":
                dtype = "uint16"
                attributes |= {
                    "bits_of": "bfloat16",
                    "how_to_read": "array.view(ml_dtypes.bfloat16)",
                    "long_name": BITS + quantity.definition,
                }
        shape = (slots.num_units * unit_rows, *(sizes[axis] for axis in dimensions[1:]))
        codec = state_codec if name == "state" else "zstd"
        specs[name] = ArraySpec(dimensions, shape, unit_rows, dtype, attributes, codec)
    return specs
