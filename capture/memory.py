"""Captures from Python: the same run as the command's, and its result as a Dataset."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors.numpy import save_file

from ..errors import RequestError
from .plan import make_plan
from .run import run_capture
from .settings import CaptureSettings
from .store.reading.reader import open_store


def capture(
    model: str,
    data: str | Path | Sequence[str] | Sequence[Sequence[int]],
    store: str | Path | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Runs a model over data and returns what was captured.

    Args:
        model: a directory, a Hub id or a `random:` spec.
        data: a file as on the command line, or texts, or token ids, one sequence each.
        store: where to write or go on with a store, read lazily; without it all is in memory afterwards.
        settings: other fields of `CaptureSettings`.
    Returns:
        the store as `looptap.open` gives it.
    Raises:
        UserError: as on the command line.
        RuntimeError: a unit failed three times; its error is in the message. The others are in the store.
    """
    with tempfile.TemporaryDirectory() as directory:
        data_path = _to_file(data, Path(directory))
        path = Path(directory) / "memory.zarr" if store is None else store  # text stays text: it may be a URL
        outcome = run_capture(make_plan(CaptureSettings(model=model, data=data_path, store=path, **settings)))
        if outcome.failures:
            first = outcome.failures[0]
            raise RuntimeError(f"{len(outcome.failures)} units failed; unit {first.unit}:\n{first.error}")
        dataset = open_store(path)
        return dataset.load() if store is None else dataset


def _to_file(data: str | Path | Sequence[str] | Sequence[Sequence[int]], directory: Path) -> Path:
    """The data as a file, so that a plan of it and of the same file are alike."""
    if isinstance(data, (str, Path)):
        return Path(data)
    if all(isinstance(row, str) for row in data):
        path = directory / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in data))
        return path
    rows = [np.asarray(row) for row in data]
    if any(row.ndim != 1 or (len(row) and row.dtype.kind not in "iu") for row in rows):
        raise RequestError("data must be a file, a list of texts, or a list of lists of whole token ids")
    lengths_S = np.array([len(row) for row in rows], np.int64)
    ids_ST = np.zeros((len(rows), max(lengths_S, default=0)), np.int64)
    for padded_T, row in zip(ids_ST, rows, strict=True):
        padded_T[: len(row)] = row
    path = directory / "ids.safetensors"
    save_file({"input_ids": ids_ST, "lengths": lengths_S}, path)
    return path
