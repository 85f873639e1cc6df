"""The plan: a dataset, a model and settings, resolved once into units, before anything runs.

The same inputs always give the same plan. A worker reads what it needs from the store that the plan made, so
a plan never travels.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PlanError
from .data import Dataset, check_rows, open_tokenizer, read_dataset
from .models.description import Description
from .models.load import ModelSource, find_model
from .models.starts import WORDS as INITIAL_STATES
from .models.starts import StatesFile, check_start, open_states
from .selection import select_depths, select_halves, select_tokens
from .settings import RUN_SETTINGS, CaptureSettings
from .store.layout import ArraySpec, Coordinate
from .store.quantities import GROUPS, QUANTITIES, resolve_quantities
from .store.writing.shard import buffer_rows
from .taps.state_stream import num_buffers
from .units import Slots, array_specs, default_unit_tokens, depth_coordinates, pack
from .versions import versions

_RUNTIME_BYTES = 350 << 20  # python, torch and zarr before a model is loaded, measured


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
    slots: Slots
    tokenizer: dict[str, Any]
    initial_states: StatesFile | None = None

    @property
    def description(self) -> Description:
        return self.source.description

    @property
    def kept_bytes(self) -> int:
        """Memory of what waits for the last recurrence in one batch: states of the core's layers for the
        gaps, their attention patterns for attention_gap, the loop state for the lens.
        """
        d = self.description
        states = (d.core if self._has_gaps else 0) + ("lens_kl" in self.quantities)
        patterns = d.core if "attention_gap" in self.quantities else 0
        of_token = states * d.width * self._itemsize + patterns * self._pattern_bytes
        return self._longest_batch * d.recurrences * of_token

    @property
    def gap_method(self) -> str | None:
        """How gaps and the lens get what the last recurrence leaves; None where none is measured."""
        if not self.kept_bytes or not self.description.core:
            return None
        fits = self.kept_bytes <= self.settings.gap_memory_gib * 2**30
        return "keep states" if fits else "run twice"

    @property
    def memory_bytes(self) -> int:
        """An estimate of the peak: runtime, weights, one unit's statistics twice (as measured and as
        written), the ring that states go through, one batch.
        """
        d = self.description
        batch = self._longest_batch * (8 * d.width + 4 * d.mlp_width) * self._itemsize
        batch += self._longest_batch * (self._map_bytes + self._before_bytes)
        if self.gap_method == "keep states":
            batch += self.kept_bytes
        elif self.gap_method == "run twice":
            batch += self.kept_bytes // d.recurrences
        weights = self.source.num_parameters * self._itemsize
        return _RUNTIME_BYTES + weights + 2 * self._statistics_bytes + self._ring_bytes + batch

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of all units' arrays before compression, which statistics shrink a little by; of slots for
        sequences only the filled ones, since the others shrink to nothing.
        """
        empty = self.slots.num_units * self.slots.unit_sequences - self.slots.num_sequences
        return sum(
            _num_bytes(spec, spec.shape[0] - (empty if spec.dimensions[0] == "sequence" else 0))
            for spec in self.arrays().values()
        )

    @property
    def _statistics_bytes(self) -> int:
        """Of one unit."""
        specs = self.arrays().items()
        return sum(_num_bytes(spec, spec.unit_rows) for name, spec in specs if name != "state")

    @property
    def _ring_bytes(self) -> int:
        if "state" not in self.quantities:
            return 0
        state = self.arrays()["state"]
        assert state.shards is not None
        itemsize = np.dtype(state.dtype).itemsize
        rows = buffer_rows(state.chunks, state.shards, itemsize)
        return num_buffers(len(self.state_depths)) * rows * self.description.width * itemsize

    @property
    def batch_tokens(self) -> int:
        """The setting; or the device's default, and fewer where maps of all pairs of blocks would keep more
        than the setting's memory.
        """
        if self.settings.batch_tokens:
            return self.settings.batch_tokens
        # on two cores 512 tokens ran as fast as 2048 within 3 %, and keep a quarter of the loop for the gaps
        tokens = 512 if self.device == "cpu" else 16_384
        if not self._map_bytes:
            return tokens
        return max(1, min(tokens, int(self.settings.gap_memory_gib * 2**30) // self._map_bytes))

    @property
    def _longest_batch(self) -> int:
        """Most tokens that one forward pass will see."""
        longest = max(map(len, self.dataset.rows))
        return min(self.slots.unit_tokens, self.dataset.num_tokens, max(self.batch_tokens, longest))

    @property
    def _pattern_bytes(self) -> int:
        """Of one token in one attention pattern: its queries, its keys, the row's sum."""
        d = self.description
        return (d.num_heads + d.num_kv_heads) * d.head_width * self._itemsize + 4 * d.num_heads

    @property
    def _before_bytes(self) -> int:
        """Of one token: what the recurrence before left, which steps are measured from."""
        d = self.description
        states = d.width * self._itemsize if any(name in GROUPS["steps"] for name in self.quantities) else 0
        patterns = self._pattern_bytes if "attention_step" in self.quantities else 0
        return d.core * (states + patterns)

    @property
    def _map_bytes(self) -> int:
        """Of one token, kept at every depth for the maps of all pairs of block invocations."""
        d = self.description
        patterns = self._pattern_bytes if "attention_distance" in self.quantities else 0
        states = d.width * self._itemsize if "residual_similarity" in self.quantities else 0
        return d.depth * (patterns + states)

    @property
    def _has_gaps(self) -> bool:
        return any(name in GROUPS["gaps"] for name in self.quantities)

    @property
    def _itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def arrays(self) -> dict[str, ArraySpec]:
        """The store's arrays that units fill."""
        d = self.description
        sizes = {
            "depth": d.depth,
            "depth_other": d.depth,
            "recurrence": d.recurrences,
            "head": d.num_heads,
            "hidden": d.width,
            "depth_state": len(self.state_depths),
        }
        return array_specs(self.quantities, self.slots, sizes, self.dtype, self.settings.state_codec)

    def coordinates(self) -> dict[str, Coordinate]:
        """All that is known of every slot before the capture."""
        depths = self.state_depths if "state" in self.quantities else None
        has_pairs = any("depth_other" in QUANTITIES[name].axes for name in self.quantities)
        steps = list(self.description.steps())
        return {**depth_coordinates(steps, depths, has_pairs=has_pairs), **self.slots.coordinates()}

    def document(self) -> dict[str, Any]:
        """The plan as the store records it; `hash` is over everything but `versions` and `created`."""
        settings = asdict(self.settings)
        # paths of one machine, whose contents are recorded instead, and what belongs to one run
        for name in ("model", "data", "store", *RUN_SETTINGS):
            del settings[name]
        settings |= {"quantities": list(self.quantities)}
        settings |= {name: list(settings[name]) for name in ("states", "zero")}
        settings |= {"device": self.device, "dtype": self.dtype}
        settings |= {"unit_tokens": self.slots.unit_tokens, "batch_tokens": self.batch_tokens}
        if self.initial_states is not None:
            settings["initial_state"] = self.initial_states.identity()
        plan: dict[str, Any] = {
            "model": self.source.identity(),
            "data": self.dataset.identity,
            "tokenizer": self.tokenizer,
            "settings": settings,
            **self.slots.facts(),
            "gap_method": self.gap_method,
            "dtype": self.dtype,
            "backend": "pytorch" if self.device == "cpu" else "triton",
        }
        plan["hash"] = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        plan["versions"] = versions()
        plan["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        return plan


def make_plan(settings: CaptureSettings, source: ModelSource | None = None) -> Plan:
    """Checks everything that can be checked before work begins, and lays out the units.

    Args:
        source: the settings' model, where it was found already.
    Raises:
        UserError: ModelError, DataError, PlanError and others; nothing was written.
    """
    settings.check()
    source = source or find_model(settings.model, settings.loop, settings.recurrences)
    names = [name for text in settings.quantities for name in text.split(",")]
    names += ["state"] if settings.states else []
    quantities = resolve_quantities(names, absent_quantities(source.description))
    if "state" in quantities and not settings.states:
        raise PlanError("the quantity state needs --states, for example --states core[all]@last")
    state_depths = select_depths(settings.states, source.description)
    select_tokens(settings.tokens, 0, 0, 1)  # its form, checked before the data is read
    select_halves(settings.zero, source.description)
    check_start(settings.initial_state, source.description)
    if settings.prelude_output != "model" and not source.description.core:
        raise PlanError(
            f"--prelude-output {settings.prelude_output}: {source.description.notation} has no loop after it"
        )
    is_text_model = source.origin.tokenizer_path is not None or settings.model.startswith("random:")
    tokenizer = open_tokenizer(source.origin.tokenizer_path) if is_text_model else None
    dataset = read_dataset(settings.data, tokenizer, field=settings.field, limit=settings.limit)
    check_rows(dataset, source.description.vocab_size, source.description.max_positions)
    rows = dataset.rows
    unit_tokens = _unit_tokens(settings.unit_tokens, dataset)
    units = tuple(pack([len(row) for row in rows], unit_tokens))
    kept = None
    if "state" in quantities and settings.tokens != "all":
        tokens, seed = settings.tokens, settings.seed
        kept = {row: select_tokens(tokens, seed, row, len(rows[row])) for unit in units for row in unit}
    device = resolve_device(settings.device, is_here=settings.engine != "ray")
    _check_kernels(source.description, device)
    return Plan(
        settings=settings,
        source=source,
        dataset=dataset,
        quantities=quantities,
        state_depths=state_depths,
        device=device,
        dtype=source.resolve_dtype(settings.dtype),
        slots=Slots(rows, units, unit_tokens, kept),
        tokenizer={"name": tokenizer.name, "sha256": tokenizer.sha256} if tokenizer else {},
        initial_states=_states_file(settings, dataset, source.description),
    )


def _num_bytes(spec: ArraySpec, rows: int) -> int:
    return rows * math.prod(spec.shape[1:]) * np.dtype(spec.dtype).itemsize


def absent_quantities(description: Description) -> dict[str, str]:
    """Quantities that a model does not have, with the reason."""
    absent = {}
    if not description.core:
        reason = f"{description.notation} has no loop; repeat a window of its layers with --loop"
        absent = dict.fromkeys((*GROUPS["lens"], *GROUPS["exit"], "attention_step", "attention_gap"), reason)
    elif not description.exit_gate:
        absent = dict.fromkeys(GROUPS["exit"], "this model has no exit gate")
    return absent


def resolve_device(device: str, is_here: bool = True) -> str:
    """The device that "auto" stands for here.

    Args:
        is_here: the model will run on this machine, so a GPU must be here.
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
    if is_here and wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"device {device} is not there; torch sees {torch.cuda.device_count()} GPUs")
    return device


def _check_kernels(description: Description, device: str) -> None:
    """Refuses at once what the attention kernels would refuse in every unit."""
    width = description.head_width
    if device.startswith("cuda") and (width % 8 or not 16 <= width <= 256):
        raise PlanError(
            f"heads are {width} wide, and a GPU takes multiples of 8 from 16 to 256; give --device cpu"
        )


def _unit_tokens(wanted: int | None, dataset: Dataset) -> int:
    row, longest = max(enumerate(map(len, dataset.rows)), key=lambda pair: pair[1])
    if wanted is None:
        return default_unit_tokens([longest])
    if longest > wanted:
        raise PlanError(
            f"row {row} has {longest} tokens and a unit of {wanted} slots holds whole sequences only; "
            f"give --unit-tokens {longest} or more"
        )
    return wanted


def _states_file(settings: CaptureSettings, dataset: Dataset, description: Description) -> StatesFile | None:
    if (wanted := settings.initial_state) is None or wanted in INITIAL_STATES:
        return None
    return open_states(Path(wanted), [len(row) for row in dataset.rows], description.width)
