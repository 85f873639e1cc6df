"""The worker: runs one unit through the model and commits what was measured. The same object works in any
engine.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreRefusedError
from .models.interventions import Interventions
from .models.model import PLAIN, LoopedModel
from .models.starts import StatesFile, initial_state, prelude_direction
from .models.tap import Packed, Plain
from .selection import select_halves
from .store.quantities import QUANTITIES
from .store.reading.coordinates import Coordinates
from .store.writing.attempt import Attempt, begin_attempt
from .store.writing.commit import Store
from .store.writing.ring import Ring
from .taps.non_finite import count_non_finite
from .taps.state_stream import StateStream, make_ring
from .taps.statistics import Buffers, LastStates, StateSink, Statistics
from .versions import versions


class _Sequence(NamedTuple):
    sequence_id: int
    start: int  # first slot inside the unit
    token_ids: np.ndarray  # int32


class _Inputs(NamedTuple):
    """Arguments of one forward pass."""

    packed: Packed
    initial_state_ND: Tensor | None
    interventions: Interventions


class Worker:
    """Holds a model on a device and works for one store.

    Args:
        model: what the store's plan is of, in its dtype, on the device that it is to run on.
        initial_states: file of initial states, if the plan reads them from one.
    """

    def __init__(self, model: LoopedModel, store: Store, initial_states: StatesFile | None = None) -> None:
        self._store = store
        self._plan = store.plan
        self._settings = settings = store.plan.settings
        assert settings.batch_tokens is not None, "a capture's plan says how many tokens run at once"
        self._batch_tokens = settings.batch_tokens
        self.model = model
        self._initial_states = initial_states
        self._zeroed = select_halves(self._settings.zero, model.description)
        self._coordinates = Coordinates(store)
        self._ring: Ring | None = None  # made for the first unit, and used for all
        has_states = "state" in self._settings.quantities
        self._state_depths: list[int] = self._coordinates.rows("state_depth").tolist() if has_states else []

    def run(self, unit: int) -> dict[str, Any]:
        """Captures and commits one unit; returns its ledger entry. An error is noted with the attempt.

        Raises:
            StoreFullError, StoreRefusedError: the place cannot be written, or has no room for the unit, which
                then is not begun.
            anything that a model or a device throws.
        """
        with self._store.full_disk_named(unit):
            sequences = self._sequences(unit)
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        self._store.check_room(unit, {"token": num_tokens, "sequence": len(sequences)})
        with begin_attempt(self._store, unit) as attempt:
            try:
                return self._run(unit, sequences, attempt)
            except Exception as error:
                _note(attempt, error)
                raise

    def _run(self, unit: int, sequences: list[_Sequence], attempt: Attempt) -> dict[str, Any]:
        started_s = time.perf_counter()
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        stream = self._open_stream(attempt)
        try:
            values = self._measure(unit, sequences, stream)
            non_finite = self._count_non_finite(values, num_tokens, len(sequences))
            if stream is not None and (count := stream.finish()):
                non_finite["state"] = count
        finally:
            if stream is not None:
                stream.release()
        receipt = {
            "num_sequences": len(sequences),
            "num_tokens": num_tokens,
            "non_finite": non_finite,
            "model_seconds": time.perf_counter() - started_s,
            "versions": versions(),
        }
        for name in list(values):
            attempt.write(name, values.pop(name).movedim(0, 1).contiguous().cpu().numpy())
        receipt["seconds"] = time.perf_counter() - started_s
        return attempt.commit(receipt)

    @torch.inference_mode()
    def forward(self, unit: int, tap: Plain = PLAIN) -> Tensor:
        """Runs one unit's batches through another tap; returns what the head would read of the last one."""
        head_input_ND = torch.empty(0)
        for batch in _batches(self._sequences(unit), self._batch_tokens):
            inputs = self._inputs(batch)
            changed_tap = inputs.interventions.around(tap)
            head_input_ND = self.model(inputs.packed, changed_tap, inputs.initial_state_ND)
        return head_input_ND

    def _sequences(self, unit: int) -> list[_Sequence]:
        C, Q = self._plan.unit_tokens, self._plan.unit_sequences
        read = self._coordinates.rows
        ids = read("token_id", unit * C, (unit + 1) * C)
        columns = (read(f"sequence_{name}", unit * Q, (unit + 1) * Q) for name in ("id", "start", "length"))
        return [
            _Sequence(int(sequence_id), int(start) - unit * C, ids[start - unit * C :][:length])
            for sequence_id, start, length in zip(*columns, strict=True)
            if length
        ]

    def _open_stream(self, attempt: Attempt) -> StateStream | None:
        if not self._state_depths:
            return None
        if self._ring is None:
            self._ring = make_ring(self._store.arrays["state"], self.model.device)
        writer = attempt.open_writer("state", ring=self._ring)
        return StateStream(writer, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def _measure(self, unit: int, sequences: list[_Sequence], states: StateSink | None) -> dict[str, Tensor]:
        d, device = self.model.description, self.model.device
        sizes = {
            "token": self._plan.unit_tokens,
            "sequence": self._plan.unit_sequences,
            "depth": d.depth,
            "depth_other": d.depth,
            "recurrence": d.recurrences,
            "head": d.num_heads,
        }
        values = {
            name: _undefined(name, sizes, device) for name in self._settings.quantities if name != "state"
        }
        keeps_some = states is not None and self._plan.num_state_rows is not None
        state_slots = self._state_slots(unit, sequences) if keeps_some else np.empty(0, np.int64)
        first_sequence = 0
        for batch in _batches(sequences, self._batch_tokens):
            start, end = batch[0].start, batch[-1].start + len(batch[-1].token_ids)
            rows = {
                "token": slice(start, end),
                "sequence": slice(first_sequence, first_sequence + len(batch)),
            }
            first_sequence += len(batch)
            part = {name: value[:, rows[QUANTITIES[name].axes[0]]] for name, value in values.items()}
            kept = None
            if keeps_some:
                first, last = np.searchsorted(state_slots, [start, end])
                kept = torch.from_numpy(state_slots[first:last] - start).to(device)
            self._measure_batch(batch, Buffers(part, states, kept))
        return values

    def _measure_batch(self, batch: list[_Sequence], buffers: Buffers) -> None:
        d = self.model.description
        packed, initial_ND, interventions = self._inputs(batch)
        first_run = None
        if self._plan.gap_method == "run twice":
            is_measured = any(name.startswith("attention_") for name in buffers.values)
            first_run = LastStates(
                d, measures_attention=is_measured, keeps_patterns="attention_gap" in buffers.values
            )
            self.model(packed, interventions.around(first_run), initial_ND)
        tap = Statistics(
            d,
            buffers,
            sink_tokens=self._settings.sink_tokens,
            state_depths=self._state_depths,
            last=first_run,
            model=self.model,
        )
        self.model(packed, interventions.around(tap), initial_ND)

    def _inputs(self, batch: list[_Sequence]) -> _Inputs:
        d, device, settings = self.model.description, self.model.device, self._settings
        token_id_N = torch.from_numpy(
            np.concatenate([sequence.token_ids for sequence in batch]).astype(np.int64)
        )
        lengths = tuple(len(sequence.token_ids) for sequence in batch)
        ids, seed = [sequence.sequence_id for sequence in batch], settings.seed
        # the plan names a file by its hash, and the worker was handed it
        wanted = settings.initial_state if isinstance(settings.initial_state, str) else None
        state_ND = initial_state(wanted, d, seed, ids, lengths, self._initial_states)
        direction_ND = prelude_direction(settings.prelude_output, seed, ids, lengths, d.width)
        return _Inputs(
            Packed(token_id_N.to(device), lengths),
            None if state_ND is None else state_ND.to(device),
            Interventions(self._zeroed, None if direction_ND is None else direction_ND.to(device)),
        )

    def _count_non_finite(
        self, values: dict[str, Tensor], num_tokens: int, num_sequences: int
    ) -> dict[str, int]:
        """Counts values that are infinite or undefined, by quantity; leaves out quantities without any."""
        sizes = {"token": num_tokens, "sequence": num_sequences}
        filled = {name: value[:, : sizes[QUANTITIES[name].axes[0]]] for name, value in values.items()}
        counts = {
            name: count_non_finite(name, value.movedim(0, 1), self.model.description.steps())
            for name, value in filled.items()
        }
        return {name: count for name, count in counts.items() if count}

    def _state_slots(self, unit: int, sequences: list[_Sequence]) -> np.ndarray:
        """Slots inside the unit whose states are kept, in order."""
        rows, C = self._plan.num_state_rows, self._plan.unit_tokens
        if rows is None:
            return np.arange(sum(len(sequence.token_ids) for sequence in sequences))
        slots = self._coordinates.rows("state_token", unit * rows, (unit + 1) * rows)
        return slots[slots >= 0] - unit * C


def _note(attempt: Attempt, error: Exception) -> None:
    """Notes why an attempt failed. That this cannot be written does not hide why: only a store that takes
    nothing more has the last word, and its message has both.
    """
    try:
        attempt.fail(f"{type(error).__name__}: {error}")
    except StoreRefusedError:
        if not isinstance(error, StoreRefusedError):
            raise
    except OSError as unwritten:
        error.add_note(f"this could not be noted in the store: {unwritten}")


def _undefined(name: str, sizes: dict[str, int], device: torch.device) -> Tensor:
    """Returns a quantity's buffer, all undefined; axes: depth or recurrence first, then token or sequence."""
    quantity = QUANTITIES[name]
    rows, axis, *more = quantity.axes
    shape = [sizes[name] for name in (axis, rows, *more)]
    if quantity.dtype == "int32":
        return torch.full(shape, -1, dtype=torch.int32, device=device)
    return torch.full(shape, float("nan"), device=device)


def _batches(sequences: list[_Sequence], batch_tokens: int) -> Iterator[list[_Sequence]]:
    """Yields neighbouring sequences of at most so many tokens; one longer than that is a batch of its own."""
    batch: list[_Sequence] = []
    used = 0
    for sequence in sequences:
        if batch and used + len(sequence.token_ids) > batch_tokens:
            yield batch
            batch, used = [], 0
        batch.append(sequence)
        used += len(sequence.token_ids)
    yield batch
