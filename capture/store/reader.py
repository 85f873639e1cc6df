"""Opening a store as an xarray Dataset, lazily, with nothing in it that was not committed.

`xarray.open_zarr` opens a store without us; this adds two things. bfloat16 states, stored as their bits, read
as float32. And while a capture is unfinished, units without a ledger entry read as missing, whatever a killed
attempt may have left there.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from .commit import Store


def open_store(path: str | Path) -> xr.Dataset:
    """The store as a lazy Dataset: a selection reads the files it touches and no others.

    `unit_done` is what the ledger says now. Where it is 0, quantities are NaN (`lens_token` -1),
    `sequence_length` is 0 and `token_sequence` -1; other coordinates keep what the plan says. Attributes
    `units_done` and `units_total` count.

    Raises:
        StoreMissingError: nothing is at the path.
        StoreError: what is there is no store, or one of another format.
    """
    store = Store.open(path)
    dataset = xr.open_zarr(store.path, chunks=None, consolidated=True)
    is_done_U = np.zeros(store.num_units, bool)
    is_done_U[store.done()] = True
    missing: dict[str, float] = {"sequence_length": 0, "token_sequence": -1}
    missing |= {name: -1 if dataset[name].dtype.kind == "i" else np.nan for name in store.arrays}
    for name in missing.keys() & dataset.variables.keys():
        if dataset[name].attrs.get("bits_of") == "bfloat16" or not is_done_U.all():
            dataset[name] = _decoded(dataset[name].variable, store.path, name, is_done_U, missing[name])
    done = ("unit", is_done_U.astype(np.uint8), dataset["unit_done"].attrs)
    return dataset.assign_coords(unit_done=done).assign_attrs(
        units_done=int(is_done_U.sum()), units_total=store.num_units
    )


def iter_units(
    source: xr.Dataset | str | Path, variables: Iterable[str] | None = None
) -> Iterator[xr.Dataset]:
    """Committed units one after the other, each loaded into memory: a store of any size can be gone through.

    Args:
        source: a store's path, or its Dataset with whole token, sequence and unit axes.
        variables: data variables to load; all by default. Coordinates of their axes come along.
    Yields:
        the unit's slice of every axis that units share; its attribute `unit` is the number. `token_sequence`
        and `sequence_start` keep counting over the whole store.
    """
    dataset = source if isinstance(source, xr.Dataset) else open_store(source)
    plan = dataset.attrs["plan"]
    done = np.flatnonzero(dataset["unit_done"].values)
    if variables is not None:
        dataset = dataset.drop_vars(set(map(str, dataset.data_vars)) - set(variables))
    rows = {"token": plan["unit_tokens"], "sequence": plan["unit_sequences"], "unit": 1}
    if "token_state" in dataset.dims:
        rows["token_state"] = plan["num_state_rows"]
    rows = {axis: num_rows for axis, num_rows in rows.items() if axis in dataset.dims}
    for axis, num_rows in rows.items():
        if dataset.sizes[axis] != plan["num_units"] * num_rows:
            raise ValueError(
                f"axis {axis} has {dataset.sizes[axis]} entries, {plan['num_units']} units of {num_rows} "
                f"have {plan['num_units'] * num_rows}: give the dataset as it was opened, with all of {axis}"
            )
    for unit in map(int, done):
        part = dataset.isel({axis: slice(unit * n, (unit + 1) * n) for axis, n in rows.items()})
        yield part.load().assign_attrs(unit=unit)


def _decoded(
    variable: xr.Variable, path: Path, name: str, is_done_U: np.ndarray, missing: float
) -> xr.Variable:
    """The same variable, decoded and masked as it is read."""
    attributes = dict(variable.attrs)
    if is_bfloat16 := attributes.pop("bits_of", None) == "bfloat16":
        attributes["stored_as"] = "bfloat16"
    array = zarr.open_array(str(path), path=name, mode="r")
    data = indexing.LazilyIndexedArray(_UnitRows(array, is_done_U, missing, is_bfloat16))
    return xr.Variable(variable.dims, data, attributes)


class _UnitRows(BackendArray):
    """A stored array whose axis 0 units share: bfloat16 decoded, rows of missing units replaced."""

    def __init__(self, array: zarr.Array[Any], is_done_U: np.ndarray, missing: float, is_bfloat16: bool):
        self.shape = array.shape
        self.dtype = np.dtype(np.float32) if is_bfloat16 else np.dtype(array.dtype)
        self._array, self._is_done_U, self._missing, self._is_bfloat16 = (
            array,
            is_done_U,
            missing,
            is_bfloat16,
        )

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        values = np.asarray(self._array.oindex[key])
        if self._is_bfloat16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        rows = key[0]
        if isinstance(rows, slice):  # not arange(n)[rows]: n may be billions
            rows = np.arange(*rows.indices(self.shape[0]))
        is_done = self._is_done_U[np.asarray(rows) // (self.shape[0] // len(self._is_done_U))]
        if is_done.all():
            return values
        is_done = is_done.reshape(is_done.shape + (1,) * (values.ndim - is_done.ndim))
        return np.where(is_done, values, self.dtype.type(self._missing))
