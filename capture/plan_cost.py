"""Estimates of the bytes that a plan takes on disk and in memory, before it runs."""

import math

import numpy as np

from .plan import Plan
from .store.layout import ArraySpec
from .store.writing.shard import buffer_rows
from .taps.state_stream import num_buffers
from .token_memory import before_bytes, itemsize_of, kept_bytes, map_bytes

_RUNTIME_BYTES = 350 << 20  # python, torch and zarr before a model is loaded, measured


def disk_bytes(plan: Plan) -> int:
    """Bytes of all units' arrays before compression, which statistics shrink a little by.

    Of slots for sequences only the filled ones count, since the others shrink to nothing.
    """
    empty = plan.slots.num_units * plan.slots.unit_sequences - plan.slots.num_sequences
    return sum(
        _num_bytes(spec, spec.shape[0] - (empty if spec.dimensions[0] == "sequence" else 0))
        for spec in plan.arrays().values()
    )


def memory_bytes(plan: Plan) -> int:
    """Estimate of the peak of memory: runtime, weights, one unit's statistics twice (as measured and as
    written), the ring that states go through, one batch.
    """
    d, itemsize = plan.description, itemsize_of(plan.dtype)
    held = (map_bytes(d, plan.quantities, plan.dtype), before_bytes(d, plan.quantities, plan.dtype))
    batch = plan.longest_batch * ((8 * d.width + 4 * d.mlp_width) * itemsize + sum(held))
    if plan.gap_method == "keep states":
        batch += plan.kept_bytes
    elif plan.gap_method == "run twice":
        batch += plan.longest_batch * kept_bytes(d, plan.quantities, plan.dtype, last_only=True)
    weights = plan.source.num_parameters * itemsize
    return _RUNTIME_BYTES + weights + 2 * _statistics_bytes(plan) + ring_bytes(plan) + batch


def _statistics_bytes(plan: Plan) -> int:
    """Bytes of one unit's arrays, without its states."""
    specs = plan.arrays().items()
    return sum(_num_bytes(spec, spec.unit_rows) for name, spec in specs if name != "state")


def ring_bytes(plan: Plan) -> int:
    """Bytes of the buffers that states go through."""
    if "state" not in plan.quantities:
        return 0
    state = plan.arrays()["state"]
    assert state.shards is not None
    itemsize = np.dtype(state.dtype).itemsize
    rows = buffer_rows(state.chunks, state.shards, itemsize)
    return num_buffers(len(plan.state_depths)) * rows * plan.description.width * itemsize


def _num_bytes(spec: ArraySpec, rows: int) -> int:
    return rows * math.prod(spec.shape[1:]) * np.dtype(spec.dtype).itemsize
