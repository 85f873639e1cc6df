"""Writes what was recorded to a store: the layout, plan and commits of a capture, at once."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import WatchError
from ..models.loop_schedule import Schedule
from ..store.layout import create_store
from ..store.places.lock import driver_lock
from ..store.plan import StoredData, StoredModel, StoredPlan, StoredSettings
from ..store.writing.attempt import Attempt, begin_attempt
from ..store.writing.commit import Store
from ..taps.non_finite import count_non_finite
from ..units import Slots, array_specs, default_unit_tokens, depth_coordinates, pack
from ..versions import versions
from .passes import Sizes
from .record import Recorder
from .watched_sequence import WatchedSequence


def write_store(
    path: str | Path, recorder: Recorder, module: nn.Module, name: str, weights: str | None
) -> None:
    """Makes the store and commits every unit.

    Args:
        name, weights: name and `hash_weights` of the module, for the plan.
    Raises:
        WatchError: nothing was recorded.
        StoreExistsError, StoreFullError: as a capture.
    """
    settings, structure, sizes = recorder.settings, recorder.structure, recorder.sizes
    rows = recorder.sequences
    num_tokens = sum(row.length for row in rows)
    if structure is None or sizes is None or not num_tokens:
        raise WatchError(
            f"no forward pass of {name} was recorded: call the module inside the context, and save afterwards"
        )
    slots = _make_slots(recorder)
    axes = {"depth": structure.depth, "hidden": sizes.width, "depth_state": len(recorder.state_depths)}
    axes |= {"head": sizes.num_heads or 0}
    state_depths = recorder.state_depths if settings.states else None
    create_store(
        path,
        plan=_make_plan(recorder, structure, sizes, slots, _identity(module, name, weights)),
        coordinates={**depth_coordinates(list(structure.steps()), state_depths), **slots.coordinates()},
        arrays=array_specs(settings.quantities, slots, axes, sizes.dtype),
    )
    store = Store.open(path)
    with driver_lock(path):
        for unit, members in enumerate(slots.units):
            started_s = time.perf_counter()
            sequences = [rows[row] for row in members]
            share = sum(sequence.length for sequence in sequences) / num_tokens
            with begin_attempt(store, unit) as attempt:
                receipt = _write_unit(attempt, sequences, settings.quantities, structure)
                receipt["model_seconds"] = recorder.seconds * share
                receipt["seconds"] = receipt["model_seconds"] + time.perf_counter() - started_s
                attempt.commit(receipt)
        store.finish()


def _make_slots(recorder: Recorder) -> Slots:
    settings, rows = recorder.settings, recorder.sequences
    lengths = [row.length for row in rows]
    unit_tokens = default_unit_tokens(lengths)
    kept = None
    if settings.states and settings.tokens != "all":
        kept = {index: row.positions for index, row in enumerate(rows) if row.length}
    empty = np.empty(0, np.int32)
    ids = [row["token_id"] if row.length else empty for row in rows]
    return Slots(ids, tuple(pack(lengths, unit_tokens)), unit_tokens, kept)


def _write_unit(
    attempt: Attempt, sequences: Sequence[WatchedSequence], quantities: Sequence[str], structure: Schedule
) -> dict[str, Any]:
    non_finite = {}
    for name in quantities:
        if name == "state":
            values = np.concatenate([part for sequence in sequences for part in sequence.states])
            filled = torch.from_numpy(values)
            filled = filled.view(torch.bfloat16) if values.dtype == np.uint16 else filled  # its bits
        else:
            values = np.concatenate([sequence[name] for sequence in sequences])
            filled = torch.from_numpy(values)
        non_finite[name] = count_non_finite(name, filled, structure.steps())
        attempt.write(name, values)
    return {
        "num_sequences": len(sequences),
        "num_tokens": sum(sequence.length for sequence in sequences),
        "non_finite": {name: count for name, count in non_finite.items() if count},
        "versions": versions(),
    }


def _make_plan(
    recorder: Recorder, structure: Schedule, sizes: Sizes, slots: Slots, identity: dict[str, Any]
) -> StoredPlan:
    settings = recorder.settings
    digest = hashlib.sha256()
    for row in slots.rows:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
    return StoredPlan(
        model=StoredModel(
            **identity,
            notation=structure.notation,
            prelude=structure.prelude,
            core=structure.core,
            recurrences=structure.recurrences,
            coda=structure.coda,
            norm="unknown",  # it cannot be seen from outside, nor can an injection
            width=sizes.width,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_key_heads,
            blocks=tuple(recorder.names[block] for block in structure.order),
        ),
        data=StoredData(
            name="watched",
            sha256=digest.hexdigest(),
            num_rows=len(slots.rows),
            num_empty_rows=sum(not len(row) for row in slots.rows),
        ),
        settings=StoredSettings(
            quantities=settings.quantities,
            sink_tokens=settings.sink_tokens,
            states=settings.states,
            tokens=settings.tokens,
            seed=settings.seed,
            dtype=sizes.dtype,
            device=sizes.device,
            unit_tokens=slots.unit_tokens,
        ),
        **slots.facts(),
        gap_method="keep states" if structure.loops and settings.has_gaps else None,
        dtype=sizes.dtype,
        backend="pytorch",
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _identity(module: nn.Module, name: str, weights: str | None) -> dict[str, Any]:
    """Returns what the plan records to identify a module."""
    return {
        "name": name,
        "spec": name,
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
        "weights_sha256": weights,
    }


def hash_weights(module: nn.Module) -> str | None:
    """Returns a hash over names, shapes, types and bytes, a tensor at a time; None if not all bytes are here.

    They are not on the meta device, nor where processes have a part each; bytes of sparse and quantised
    tensors are not read.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for plain in _plain_tensors(tensor.detach()):
            if plain is None:
                return None
            plain = plain.resolve_conj().resolve_neg().cpu().contiguous()
            digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor | None]:
    """Yields the tensors whose bytes a tensor's values are, which may be of a class that wraps others; None
    for one whose bytes cannot be read here.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None and mesh.size() > 1:  # of a sharded tensor this process has a part
        yield None
    elif type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):
                yield from _plain_tensors(part)
    elif (
        type(tensor) is not Tensor
        or tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.is_quantized
        or tensor.is_nested
    ):
        yield None
    else:
        yield tensor
