"""Opens a store as an xarray Dataset, lazily, with nothing in it that was not committed.

`xarray.open_zarr` opens a store without us; this adds three things. Uncompressed local states are mapped
(`mapped_states.py`), which random rows need. bfloat16, stored as its bits, reads as float32. And while units
are missing their rows read as missing, or are refused, whatever a killed attempt may have left there.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from ....errors import MissingUnitsError, RequestError, UnfitError, os_errors_named
from ..places.directory import LocalPlace
from ..plan import plan_of
from ..quantities import BITS
from ..writing.commit import Store
from .decoded_arrays import LibraryArray
from .mapped_states import Key, MappedArray, can_map
from .strict_store import StrictStore, damaged


def open_store(
    path: str | Path, *, missing: Literal["mask", "raise"] = "mask", decode: bool = True
) -> xr.Dataset:
    """Opens a store as a lazy Dataset: a selection reads the files it touches and no others.

    `unit_done` is what the ledger says now, and stays the Dataset's: units committed or voided later change
    nothing in it. Where it is 0, quantities are NaN (`lens_token` -1), `sequence_length` is 0 and
    `token_sequence` -1; other coordinates keep what the plan says. Attributes `units_done` and `units_total`
    count. Threads may share it and processes be sent it, as dask does; `dataset.chunk({"token": C})` with
    the plan's `unit_tokens` as C cuts it where files end.

    Args:
        path: a local directory or s3://bucket/prefix.
        missing: "raise" refuses to read quantities where `unit_done` is 0.
        decode: False leaves bfloat16 as its bits, uint16: half the bytes, for
            `torch.from_numpy(values).view(torch.bfloat16)`.
    Raises:
        StoreMissingError: nothing is at the path.
        StoreError: what is there is no store, or one of another format.
        MissingUnitsError: later, where values are read.
    """
    if missing not in ("mask", "raise"):
        raise RequestError(f"missing is {missing!r}: give 'mask' or 'raise'")
    store = Store.open(path)
    with os_errors_named(path, "read"):
        strict = StrictStore(store.place, set(store.layout.coordinates) - {"unit_done"})
        try:
            dataset = xr.open_zarr(strict, chunks=None, consolidated=True)
        except (RuntimeError, ValueError) as error:  # axes are read at once
            raise damaged(store, "a coordinate", error) from error
    is_done_U = np.zeros(store.num_units, bool)
    is_done_U[store.done()] = True
    for name in store.arrays:
        rows = _UnitRows(store, name, is_done_U, missing)
        dataset[name] = _lazy(dataset[name].variable, rows, decode)
    absent = {"sequence_length": 0, "token_sequence": -1}
    for name in set(store.layout.coordinates) - {"unit_done"} - set(dataset.xindexes):
        is_there_U = is_done_U if name in absent else np.ones(store.num_units, bool)
        rows = _UnitRows(store, name, is_there_U, "mask", absent.get(name))
        dataset = dataset.assign_coords({name: _lazy(dataset[name].variable, rows, decode)})
    done = ("unit", is_done_U.astype(np.uint8), dataset["unit_done"].attrs)
    return dataset.assign_coords(unit_done=done).assign_attrs(
        units_done=int(is_done_U.sum()), units_total=store.num_units
    )


def open_array(store: Store, name: str) -> MappedArray | LibraryArray:
    """Opens one array of a store as it lies there, with nothing masked: memory-mapped if it can be."""
    metadata = store.metadata[name]
    directory = store.path if isinstance(store.place, LocalPlace) else None
    if directory is not None and can_map(metadata):
        return MappedArray(directory / name, metadata)
    return LibraryArray(store.place, directory, name, metadata)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Returns bfloat16, given as its bits in uint16, as float32."""
    values = bits.astype(np.uint32)
    values <<= 16
    return values.view(np.float32)


def iter_units(
    source: xr.Dataset | str | Path, variables: Iterable[str] | None = None
) -> Iterator[xr.Dataset]:
    """Yields committed units, each loaded into memory, so that a store of any size can be gone through.

    Args:
        source: a store's path, or its Dataset with whole token, sequence and unit axes.
        variables: data variables to load; all by default. Coordinates of their axes come along.
    Yields:
        the unit's slice of every axis that units share; its attribute `unit` is the number. `token_sequence`
        and `sequence_start` keep counting over the whole store.
    """
    dataset = source if isinstance(source, xr.Dataset) else open_store(source)
    plan = plan_of(dataset)
    done = np.flatnonzero(dataset["unit_done"].values)
    if variables is not None:
        dataset = dataset.drop_vars(set(map(str, dataset.data_vars)) - set(variables))
    shared = ("token", "sequence", "unit", "token_state")
    rows = {axis: plan.unit_rows(axis) for axis in shared if axis in dataset.dims}
    for axis, num_rows in rows.items():
        if dataset.sizes[axis] != plan.num_units * num_rows:
            raise UnfitError(
                f"axis {axis} has {dataset.sizes[axis]} entries, {plan.num_units} units of {num_rows} "
                f"have {plan.num_units * num_rows}: give the dataset as it was opened, with all of {axis}"
            )
    for unit in map(int, done):
        part = dataset.isel({axis: slice(unit * n, (unit + 1) * n) for axis, n in rows.items()})
        yield part.load().assign_attrs(unit=unit)


def _lazy(variable: xr.Variable, rows: "_UnitRows", decode: bool) -> xr.Variable:
    """Returns the same variable, masked and perhaps decoded as it is read."""
    attributes = dict(variable.attrs)
    if decode and attributes.get("bits_of") == "bfloat16":
        attributes["stored_as"] = attributes.pop("bits_of")
        attributes["long_name"] = str(attributes.get("long_name", "")).removeprefix(BITS)
        rows.decodes_bfloat16()
    return xr.Variable(variable.dims, indexing.LazilyIndexedArray(rows), attributes)


class _UnitRows(BackendArray):
    """A stored array whose axis 0 units share, with rows of missing units replaced or refused."""

    def __init__(
        self, store: Store, name: str, is_done_U: np.ndarray, missing: str, absent: float | None = None
    ) -> None:
        self._source = open_array(store, name)
        self.shape, self.dtype = self._source.shape, self._source.dtype
        metadata = store.metadata[name]
        self._name, self._is_done_U, self._missing = name, is_done_U, missing
        self._absent = self.dtype.type(metadata["fill_value"] if absent is None else absent)
        self._is_bfloat16 = False
        self._place = str(store)

    def decodes_bfloat16(self) -> None:
        """Makes values read as float32 from now on."""
        self._is_bfloat16, self.dtype = True, np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        if isinstance(key, indexing.BasicIndexer | indexing.OuterIndexer):
            return self._read(key.tuple)  # the adapter would sort rows, and copy the result to undo that
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        wanted = tuple(_to_slice_or_rows(k, n) for k, n in zip(key, self.shape, strict=True))
        values = self._committed(wanted)
        if self._is_bfloat16:
            values = to_float32(values)
        return values.squeeze(
            tuple(axis for axis, k in enumerate(key) if np.ndim(k) == 0 and not isinstance(k, slice))
        )

    def _committed(self, key: Key) -> np.ndarray:
        rows, *rest = key
        if self._is_done_U.all():
            return self._source.read(key)
        unit_rows = self.shape[0] // len(self._is_done_U)
        if isinstance(rows, slice):
            units = np.arange(rows.start // unit_rows, -(-max(rows.stop, rows.start) // unit_rows))
        else:
            units = rows // unit_rows
        is_done = self._is_done_U[units]
        if is_done.all():
            return self._source.read(key)
        if self._missing == "raise":
            raise self._refusal(np.unique(units[~is_done]))
        lengths = (k.stop - k.start if isinstance(k, slice) else len(k) for k in key)
        values = np.full(tuple(lengths), self._absent, self._source.dtype)
        if not isinstance(rows, slice):
            if is_done.any():
                values[is_done] = self._source.read((rows[is_done], *rest))
            return values
        edges = np.flatnonzero(np.diff(is_done, prepend=False, append=False)) + units[0]
        for first, stop in edges.reshape(-1, 2).tolist():  # runs of neighbouring committed units
            here = slice(max(first * unit_rows, rows.start), min(stop * unit_rows, rows.stop))
            values[here.start - rows.start : here.stop - rows.start] = self._source.read((here, *rest))
        return values

    def _refusal(self, units: np.ndarray) -> MissingUnitsError:
        more = f" and {len(units) - 8} more" if len(units) > 8 else ""
        return MissingUnitsError(
            f"{self._name} of unit {', '.join(map(str, units[:8]))}{more} is not committed in "
            f"{self._place}: capture the rest, or open the store with missing='mask'"
        )


def _to_slice_or_rows(key: Any, length: int) -> slice | np.ndarray:
    """Returns an axis's key as sources take it."""
    if isinstance(key, slice):
        wanted = range(length)[key]
        if wanted.step == 1:
            return slice(wanted.start, max(wanted.start, wanted.stop))
        return np.arange(wanted.start, wanted.stop, wanted.step, dtype=np.int64)
    if np.ndim(key) == 0:
        first = int(key) % length
        return slice(first, first + 1)
    places = np.asarray(key, np.int64)
    return np.where(places < 0, places + length, places)
