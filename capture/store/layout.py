"""Making a store: a Zarr v3 group whose arrays all have their final shapes before anything is captured.

    run.zarr/
      zarr.json                     the plan as attributes, consolidated metadata of every array
      <coordinate>/zarr.json c.0    written here, whole
      <quantity>/zarr.json          made here, empty
      <quantity>/c.<u>.0 ...        a unit's file or files, put there by `writing/attempt.py`
      unit_done/                    which units are there, written when the last one is
      .looptap/plan.json  files.json  ledger/  attempts/  staging/

On a disk or, with the same keys, in an object store (`places/`). A unit owns `unit_rows` rows of axis 0 of
every quantity, in whole files, so no two units share one. Nothing is resized, so the consolidated metadata
written here is never stale.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from ...errors import StoreExistsError, os_errors_named
from .group import Group, store_exists
from .keys import FILES, PLAN
from .places.disk import file_record, write_new
from .places.open import open_place
from .plan import StoredPlan

BFLOAT16_NAN = 0x7FC0
_COORDINATE_ROWS = 1 << 18  # 1 to 2 MiB a chunk
_SHARD_BYTES = 512 << 20

Codec = Literal["zstd", "none", "lossless"]

Coordinate = tuple[tuple[str, ...], np.ndarray, dict[str, Any]]


@dataclass(frozen=True)
class ArraySpec:
    """One quantity's array.

    `unit_rows` is how many rows of axis 0 one unit owns. With codec "zstd" (statistics) they are one chunk.
    Otherwise (states) they are one or more whole shards of `shard_rows` rows, inside which each chunk holds
    up to 512 rows of one depth (axis 1): bare with "none", by blosc lz4 with bits shuffled with "lossless".
    bfloat16 is kept as uint16 with the attribute bits_of="bfloat16".
    """

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    unit_rows: int
    dtype: str
    attributes: dict[str, Any]
    codec: Codec = "zstd"
    shard_rows: int | None = None
    """Rows of one shard; by default as many of the unit's rows as keep it within 512 MiB."""

    def __post_init__(self) -> None:
        if self.shard_rows is not None and (self.codec == "zstd" or self.unit_rows % self.shard_rows):
            raise ValueError(
                f"shards of {self.shard_rows} rows do not make up a unit of {self.unit_rows} rows with codec "
                f"{self.codec}: give a divisor of it, and codec none or lossless"
            )

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of what is read at once."""
        if self.codec == "zstd":
            return (self.unit_rows, *self.shape[1:])
        rows = inner_rows(self.shard_rows or self.unit_rows)
        return (rows, *(1 for _ in self.shape[1:2]), *self.shape[2:])

    @property
    def shards(self) -> tuple[int, ...] | None:
        """Shape of one file that holds many chunks; None where a file is one chunk."""
        if self.codec == "zstd":
            return None
        rows, row_bytes = self.shard_rows, math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        if rows is None:
            inner = self.chunks[0]
            sizes = (
                n * inner for n in range(self.unit_rows // inner, 0, -1) if self.unit_rows % (n * inner) == 0
            )
            rows = next((size for size in sizes if size * row_bytes <= _SHARD_BYTES), inner)
        return (rows, *self.shape[1:])


def create_store(
    path: str | Path,
    *,
    plan: StoredPlan,
    coordinates: Mapping[str, Coordinate],
    arrays: Mapping[str, ArraySpec],
) -> None:
    """Makes the store of a plan; it appears under its name complete and synced, or not at all.

    Args:
        plan: what is captured, kept as the group's attribute `plan`.
        coordinates: name -> (dimensions, values, attributes), known from the plan. `unit_done` is added.
        arrays: name -> the array to be filled by units.
    Raises:
        StoreExistsError: something is at the path; nothing was written.
        StoreFullError: no room for the coordinates.
    """
    place = open_place(path)
    if store_exists(path):
        raise StoreExistsError(f"{place} holds a store: open it to go on with it, or choose another path")
    for name, spec in arrays.items():
        if spec.shape[0] != plan.num_units * spec.unit_rows:
            raise ValueError(
                f"{name} has {spec.shape[0]} rows, but {plan.num_units} units of {spec.unit_rows} rows "
                f"make {plan.num_units * spec.unit_rows}"
            )
    num_bytes = sum(values.nbytes for _, values, _ in coordinates.values())
    task = "the coordinates of a new store"
    with os_errors_named(str(path), "written"), place.full_disk_named(task, num_bytes):
        place.make(lambda root: _fill(root, plan, coordinates, arrays))


def inner_rows(unit_rows: int) -> int:
    """Returns the rows of a shard's inner chunk: the most, up to 512, that divide a unit.

    A unit whose divisors are all small (a prime number of rows) is one chunk: tiny ones cost more than large.
    """
    divisor = next(rows for rows in range(min(512, unit_rows), 0, -1) if unit_rows % rows == 0)
    return divisor if divisor >= 128 else unit_rows


def _fill(
    root: Path, plan: StoredPlan, coordinates: Mapping[str, Coordinate], arrays: Mapping[str, ArraySpec]
) -> None:
    coordinates = dict(coordinates)
    coordinates["unit_done"] = (
        ("unit",),
        np.zeros(plan.num_units, np.uint8),
        {"long_name": "whether the unit was captured", "note": "written when the capture is complete"},
    )
    for name, (dimensions, values, attributes) in coordinates.items():
        _write_coordinate(root, name, dimensions, np.asarray(values), attributes)
    for name, spec in arrays.items():
        described = " ".join(
            other
            for other, (dimensions, *_) in coordinates.items()
            if other not in spec.dimensions and set(dimensions) <= set(spec.dimensions)
        )
        _make_array(root, name, spec, {"coordinates": described} if described else {})
    names = [*coordinates, *arrays]
    metadata = {name: json.loads((root / name / "zarr.json").read_bytes()) for name in names}
    group = Group(plan.to_json(), tuple(coordinates), metadata)
    (root / "zarr.json").unlink(missing_ok=True)
    write_new(root / "zarr.json", group.to_bytes())
    (root / ".looptap").mkdir()
    write_new(root / PLAN, group.plan_bytes())
    files = {key: file_record((root / key).read_bytes()) for key in group.planned_keys()}
    write_new(root / FILES, json.dumps(files).encode())


def _write_coordinate(
    root: Path, name: str, dimensions: tuple[str, ...], values: np.ndarray, attributes: dict[str, Any]
) -> None:
    if values.dtype.kind not in "iuf":
        raise ValueError(f"coordinate {name} has type {values.dtype}: give whole numbers or floats")
    array = zarr.create_array(
        str(root),
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, min(len(values), _COORDINATE_ROWS)), *values.shape[1:]),
        compressors=[ZstdCodec(level=1, checksum=True)],
        fill_value=_fill_value(values.dtype, attributes),
        attributes=attributes,
        dimension_names=dimensions,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[...] = values


def _make_array(root: Path, name: str, spec: ArraySpec, attributes: dict[str, Any]) -> None:
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=np.dtype(spec.dtype).itemsize)
    zarr.create_array(
        str(root),
        name=name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunks,
        shards=spec.shards,
        compressors={"zstd": [ZstdCodec(level=1, checksum=True)], "lossless": [blosc], "none": None}[
            spec.codec
        ],
        fill_value=_fill_value(np.dtype(spec.dtype), spec.attributes),
        attributes={**spec.attributes, **attributes},
        dimension_names=spec.dimensions,
        chunk_key_encoding={"name": "default", "separator": "."},
    )


def _fill_value(dtype: np.dtype, attributes: dict[str, Any]) -> int | float:
    """Returns what an unwritten element reads as: never something that could be data."""
    if attributes.get("bits_of") == "bfloat16":
        return BFLOAT16_NAN
    return {"f": float("nan"), "i": -1, "u": 0}[dtype.kind]
