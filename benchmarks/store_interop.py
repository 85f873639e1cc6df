"""S11: every library that should read a store reads it bit for bit, ragged tails and missing units included.

This is what is installed here, beside looptap. `make interop` reads in environments that have no looptap,
with an old and a new zarr.
"""

import importlib.util
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from ..capture.store.layout import BFLOAT16_NAN, ArraySpec, create_store
from ..capture.store.writing.attempt import begin_attempt
from ..capture.store.writing.commit import Store
from .bare_plan import bare_plan
from .goals import Figure

_UNIT_TOKENS, _DEPTHS, _WIDTH = 2048, 3, 16
_TOKENS = {0: 2048, 2: 700, 3: 1}  # of each committed unit; unit 1 is missing


def count_readers(folder: Path) -> Figure:
    """How many readers find exactly what was written."""
    store, expected = _write(folder / "interop.zarr")
    readers: dict[str, Callable[[Path, str], np.ndarray]] = {
        "zarr": lambda path, name: np.asarray(zarr.open_array(path / name, mode="r")[...]),
        "zarrs": _read_by_zarrs,
        "tensorstore": _read_by_tensorstore,
        "xarray": lambda path, name: xr.open_zarr(path, chunks=None)[name].values,
        "dask": lambda path, name: xr.open_zarr(path)[name].compute().values,
    }
    found = {}
    for name, read in readers.items():
        if importlib.util.find_spec(name) is None:
            found[name] = "not installed"
            continue
        wrong = [array for array, want in expected.items() if not _equal(read(store.path, array), want)]
        found[name] = f"{version(name)} {'wrong in ' + ', '.join(wrong) if wrong else 'equal'}"
    if importlib.util.find_spec("tensorstore") is not None:
        bits = _read_by_tensorstore(store.path, "state", data_type="bfloat16", fill_value="NaN").view(
            np.uint16
        )
        found["tensorstore as bfloat16"] = "equal" if _equal(bits, expected["state"]) else "wrong"
    num_equal = sum(text.endswith("equal") for text in found.values())
    return Figure(
        name="S11",
        what="readers that find what was written, of 6",
        seen=num_equal,
        must=6,
        better="higher",
        detail=", ".join(f"{name} {text}" for name, text in found.items()),
    )


def _write(path: Path) -> tuple[Store, dict[str, np.ndarray]]:
    shape = (4 * _UNIT_TOKENS, _DEPTHS, _WIDTH)
    state = ("token", "depth_state", "hidden")
    specs = {
        "state": ArraySpec(state, shape, _UNIT_TOKENS, "uint16", {"bits_of": "bfloat16"}, "none", 1024),
        "state_packed": ArraySpec(state, shape, _UNIT_TOKENS, "float32", {}, "lossless", 1024),
        "residual_norm": ArraySpec(("token", "depth"), shape[:2], _UNIT_TOKENS, "float32", {}),
    }
    plan = bare_plan(4, _UNIT_TOKENS)
    create_store(path, plan=plan, coordinates={}, arrays=specs)
    store, generator = Store.open(path), np.random.default_rng(0)
    expected = {
        name: np.full(spec.shape, BFLOAT16_NAN if name == "state" else np.nan, spec.dtype)
        for name, spec in specs.items()
    }
    for unit, num_tokens in _TOKENS.items():
        with begin_attempt(store, unit) as attempt:
            for name, spec in specs.items():
                rows = generator.integers(0, 0x7F80, (num_tokens, *spec.shape[1:])).astype(spec.dtype)
                attempt.write(name, rows)
                expected[name][unit * _UNIT_TOKENS : unit * _UNIT_TOKENS + num_tokens] = rows
            attempt.commit({"num_sequences": 1, "num_tokens": num_tokens, "seconds": 0.0, "non_finite": {}})
    return store, expected


def _read_by_zarrs(path: Path, name: str) -> np.ndarray:
    import zarrs  # noqa: F401

    options = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(options):
        return np.asarray(zarr.open_array(path / name, mode="r")[...])


def _read_by_tensorstore(path: Path, name: str, **metadata: str) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}}
    if metadata:
        stored = json.loads((path / name / "zarr.json").read_bytes())
        del stored["attributes"]
        spec |= {"metadata": stored | metadata, "assume_metadata": True}
    return tensorstore.open(spec, read=True).result()[...].read().result()


def _equal(seen: np.ndarray, want: np.ndarray) -> bool:
    return seen.dtype == want.dtype and np.array_equal(seen, want, equal_nan=seen.dtype.kind == "f")
