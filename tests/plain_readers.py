"""Reads a store with every library that should, without looptap, and compares with what was written.

    python -I plain_readers.py STORE EXPECTED.npz

Run it in an environment that has no looptap: `make interop` makes two. Beside the values it looks for what
the store promises: no warning, bfloat16 in tensorstore without a copy of the data, and, from zarr 3.2 on, an
error instead of fill where units are missing.
"""

# ruff: noqa: E402

import importlib.util
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

if len(sys.argv) == 4:  # of the test, which has no environment of its own to offer
    sys.path.insert(0, sys.argv.pop())
assert importlib.util.find_spec("looptap") is None, "looptap can be imported here: use a bare environment"

import dask
import ml_dtypes
import numpy as np
import tensorstore
import xarray as xr
import zarr
import zarrs

READERS = {}


def reader(function):
    READERS[function.__name__] = function
    return function


@reader
def zarr_python(path, names):
    group = zarr.open_group(path, mode="r")
    return {name: group[name][...] for name in names}


@reader
def zarrs_pipeline(path, names):
    # dotted keys: replacing the whole setting would drop others; strict: no falling back to zarr-python
    options = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(options):
        group = zarr.open_group(path, mode="r")
        for name in names:
            pipeline = group[name]._async_array.codec_pipeline
            assert isinstance(pipeline, zarrs.ZarrsCodecPipeline), pipeline
        return {name: group[name][...] for name in names}


@reader
def tensorstore_plain(path, names):
    return {name: open_tensorstore(path, name)[...].read().result() for name in names}


@reader
def tensorstore_bfloat16(path, names):
    """Reads arrays that are stored as bits of bfloat16 as bfloat16."""
    values = {}
    for name in names:
        metadata = json.loads((Path(path) / name / "zarr.json").read_bytes())
        if metadata.pop("attributes").get("bits_of") != "bfloat16":
            continue
        metadata |= {"data_type": "bfloat16", "fill_value": "NaN"}  # 32704, the bits of NaN, is a number here
        array = open_tensorstore(path, name, metadata=metadata, assume_metadata=True)
        read = array[...].read().result()
        assert read.dtype == ml_dtypes.bfloat16, read.dtype
        values[name] = read.view(np.uint16)
    assert values
    return values


@reader
def xarray_alone(path, names):
    dataset = xr.open_zarr(path, chunks=None)
    assert all(dataset[name].chunks is None for name in names)
    return {name: dataset[name].values for name in names}


@reader
def xarray_dask(path, names):
    dataset = xr.open_zarr(path)
    assert all(dataset[name].chunks for name in names if name not in dataset.indexes)
    with dask.config.set(scheduler="threads"):
        loaded = dataset.compute()
        return {name: loaded[name].values for name in names}


def open_tensorstore(path, name, **more):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}, **more}
    return tensorstore.open(spec, read=True).result()  # open=True would undo assume_metadata


def check_missing_units(path, names, unit_done):
    """Told to refuse what was never written, zarr does; holes inside a unit still read as fill.

    Returns:
        whether it can be told.
    """
    if tuple(map(int, zarr.__version__.split(".")[:2])) < (3, 2):
        return False
    group = zarr.open_group(path, mode="r")
    for name in set(names) - set(group.attrs["coordinates"].split()):
        array = group[name].with_config({"read_missing_chunks": False})
        rows = array.shape[0] // len(unit_done)
        for unit, done in enumerate(unit_done):
            try:
                array[unit * rows : (unit + 1) * rows]
                assert done, f"unit {unit} of {name} was read, though it is missing"
            except zarr.errors.ChunkNotFoundError:
                assert not done, f"unit {unit} of {name} was refused"
    return True


def main():
    path, expected_path = sys.argv[1:]
    warnings.simplefilter("error")
    expected = dict(np.load(expected_path))
    is_done = expected.pop("is_done")
    for name, read in READERS.items():
        values = read(path, [*expected])
        for array, seen in values.items():
            assert seen.dtype == expected[array].dtype, f"{name}: {array} is {seen.dtype}"
            np.testing.assert_array_equal(seen, expected[array], err_msg=f"{name}: {array}")
        print(f"{name}: {len(values)} arrays")
    libraries = (zarr, zarrs, tensorstore, xr, dask)
    versions = {library.__name__: version(library.__name__) for library in libraries}
    refuses = check_missing_units(path, [*expected], is_done)
    found = {"readers": [*READERS], "refuses_missing_units": refuses, "arrays": [*expected]}
    print(json.dumps({**found, "python": sys.version.split()[0], **versions}))


if __name__ == "__main__":
    main()
