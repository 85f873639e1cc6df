"""Captures from Python: runs what `looptap capture` runs, and returns the result as a Dataset."""

import tempfile
from pathlib import Path
from typing import Any

import xarray as xr

from ..errors import RequestError
from .data import Rows, make_dataset
from .models.load import find_model
from .plan import Plan, make_plan
from .run import run_capture
from .settings import CaptureSettings
from .store.reading.reader import open_store
from .tokenizer import model_tokenizer


def capture(
    model: str | Path,
    data: str | Path | Rows,
    store: str | Path | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Runs a model over data and returns what was captured.

    Args:
        model: a directory, a Hub id or a `random:` spec.
        data: a file as on the command line, or texts, or token ids, one sequence each: any iterable, an array
            or a tensor [S, T].
        store: path of a store to write or go on with, read lazily; without it all is in memory afterwards.
        settings: any other of `CaptureSettings`, by its name on the command line.
    Returns:
        the store as `looptap.open` gives it.
    Raises:
        UserError: as on the command line.
        TypeError: no setting has such a name.
        RuntimeError: a unit failed three times; its error is in the message. The others are in the store.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "memory.zarr" if store is None else store  # text stays text: it may be a URL
        outcome = run_capture(_plan(data, settings | {"model": model, "store": path}))
        if outcome.failures:
            first = outcome.failures[0]
            raise RuntimeError(f"{len(outcome.failures)} units failed; unit {first.unit}:\n{first.error}")
        dataset = open_store(path)
        return dataset.load() if store is None else dataset


def _plan(data: str | Path | Rows, settings: dict[str, Any]) -> Plan:
    if isinstance(data, (str, Path)):
        return make_plan(CaptureSettings.of(data=Path(data), **settings))
    if "field" in settings:
        raise RequestError("field is of a .jsonl file, and the data is no file: leave it out")
    wanted = CaptureSettings.of(data=Path("rows"), **settings)
    wanted.check()  # before the rows are cut to a limit
    model = wanted.model
    source = find_model(model.model, model.loop, model.recurrences)
    tokenizer = model_tokenizer(source, wanted.data.special_tokens)
    dataset = make_dataset(data, tokenizer, limit=wanted.data.limit)
    return make_plan(wanted, source, dataset)
