"""What the layout of a store is worth: how little of it is padding (S10), how quickly it opens (S14).

Padding each sequence to the longest stores rows that nobody reads. Here sequences lie on one token axis,
whole, in units of a fixed number of slots; only the last chunk of a unit is padded. Opening is quick as the
metadata of all arrays is in the group's own: one file is read, not one an array.
"""

import math
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import xarray as xr

from ..capture.data import read_dataset
from ..capture.models.other_files import tokenizer_files
from ..capture.store.layout import ArraySpec, create_store
from ..capture.store.quantities import QUANTITIES
from ..capture.store.writing.attempt import begin_attempt
from ..capture.store.writing.commit import Store
from ..capture.tokenizer import BYTES, open_tokenizer
from ..capture.units import pack
from .bare_plan import bare_plan
from .bench_settings import StoreBench
from .goals import Figure

_WIDTH = 1024
_RECEIPT = {"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}}


def measure_flatness(settings: StoreBench) -> Figure:
    """S10: bytes of states in a store of real sequences that are of tokens."""
    with ExitStack() as stack:
        bundled = files("looptap.capture.studies") / "demo_prompts.jsonl"
        path = settings.data or stack.enter_context(as_file(bundled))
        tokenizer = BYTES
        if settings.tokenizer is not None:
            tokenizer = open_tokenizer(tokenizer_files(settings.tokenizer.parent))
        lengths = [len(row) for row in read_dataset(path, tokenizer, field=settings.field).rows]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=settings.directory)))
        stored = {rows: _stored_rows(lengths, rows, folder / f"{rows}.zarr") for rows in (4096, 16384)}
    useful, padded = sum(lengths), len(lengths) * max(lengths)
    return Figure(
        name="S10",
        what="states of tokens / states stored, in bytes, units of 4096",
        seen=useful / stored[4096],
        must=0.95,
        stretch=0.98,
        better="higher",
        detail=f"{path.name}: {len(lengths)} sequences, {useful} tokens, longest {max(lengths)}; "
        f"units of 16384 {useful / stored[16384]:.3f}, padded to the longest {useful / padded:.3f}",
    )


def _stored_rows(lengths: list[int], unit_tokens: int, path: Path) -> float:
    """Writes the states of one depth; what the files hold that is no hole, in rows."""
    units = list(pack(lengths, unit_tokens))
    plan = bare_plan(len(units), unit_tokens)
    shape = (len(units) * unit_tokens, 1, _WIDTH)
    spec = ArraySpec(("token", "depth_state", "hidden"), shape, unit_tokens, "uint16", {}, "none")
    create_store(path, plan=plan, coordinates={}, arrays={"state": spec})
    store = Store.open(path)
    num_bytes = 0
    for unit, rows in enumerate(units):
        with begin_attempt(store, unit) as attempt:
            attempt.write("state", np.zeros((sum(lengths[row] for row in rows), 1, _WIDTH), np.uint16))
            entry = attempt.commit(_RECEIPT)
        num_bytes += sum(size for shard in entry["shards"]["state"] for _, size, _ in shard["pieces"])
    return num_bytes / (_WIDTH * 2)


def measure_opening(settings: StoreBench, folder: Path) -> Figure:
    """S14: a store of 28 arrays."""
    axes = {"token": 64, "sequence": 4, "depth": 6, "depth_other": 6, "head": 2, "recurrence": 3}
    units = bare_plan(4, 64, 4)
    arrays = {
        name: ArraySpec(
            q.axes,
            tuple(axes[a] * (4 if i == 0 else 1) for i, a in enumerate(q.axes)),
            axes[q.axes[0]],
            q.dtype,
            {},
        )
        for name, q in QUANTITIES.items()
        if name != "state"
    }
    num_coordinates = 28 - len(arrays) - 1  # one more is made with the store
    coordinates = {
        f"coordinate_{number}": (("token",), np.arange(256, dtype=np.int32), {})
        for number in range(num_coordinates)
    }
    create_store(folder / "many.zarr", plan=units, coordinates=coordinates, arrays=arrays)
    times: dict[bool, list[float]] = {True: [], False: []}
    num_warnings = 0
    for _ in range(settings.repeats + 1):
        for is_consolidated, seconds in times.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                started_s = time.perf_counter()
                # what a user calls finds the consolidated metadata by itself
                consolidated = None if is_consolidated else False
                dataset = xr.open_zarr(folder / "many.zarr", chunks=None, consolidated=consolidated)
                seconds.append(time.perf_counter() - started_s)
            assert len(dataset.variables) == 28
            num_warnings += len(caught) if is_consolidated else 0
    return Figure(
        name="S14",
        what="xarray.open_zarr of 28 arrays, s",
        seen=math.inf if num_warnings else statistics.median(times[True][1:]),
        must=0.1,
        stretch=0.02,
        better="lower",
        detail=f"{num_warnings} warnings; without consolidated metadata "
        f"{statistics.median(times[False][1:]):.3g} s",
    )
