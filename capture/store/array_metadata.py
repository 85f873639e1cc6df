"""What this layout writes of an array's metadata: what a store is held to, wherever it comes from."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from .keys import ARRAY_NAME

COORDINATE_AXES = {
    "depth": "depth", "stage": "depth", "layer": "depth", "recurrence": "depth", "depth_other": "depth_other",
    "state_depth": "depth_state", "token_id": "token", "token_position": "token", "token_sequence": "token",
    "sequence_start": "sequence", "sequence_length": "sequence", "sequence_id": "sequence",
    "state_token": "token_state", "unit_done": "unit",
}  # fmt: skip
"""The one axis of each coordinate, in the order in which captures write them."""

MAX_FILES = 2**28
_MAX_FILE_BYTES = 2**40
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**48)]


class _Codec(msgspec.Struct):
    name: str
    configuration: dict[str, Any] = {}


class _ChunkShape(msgspec.Struct):
    chunk_shape: list[_Count]


class _ChunkGrid(msgspec.Struct):
    name: Literal["regular"]
    configuration: _ChunkShape


class _Separator(msgspec.Struct):
    separator: Literal["."]


class _ChunkKeys(msgspec.Struct):
    name: Literal["default"]
    configuration: _Separator


class _Sharding(msgspec.Struct):
    chunk_shape: list[_Count]
    codecs: list[_Codec]
    index_codecs: list[_Codec]
    index_location: Literal["end"]


class _Array(msgspec.Struct):
    """What this layout writes of an array's metadata; attributes and what else is there may be anything."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**48)]]
    data_type: Literal[
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
    chunk_grid: _ChunkGrid
    chunk_key_encoding: _ChunkKeys
    fill_value: float | Literal["NaN"]
    codecs: list[_Codec]
    attributes: dict[str, Any]
    dimension_names: list[str]
    storage_transformers: list[_Codec] = []


def check_array(name: str, array: Mapping[str, Any]) -> None:
    """Checks an array's name and metadata.

    Raises:
        ValueError: it cannot be an array of a store.
    """
    if not ARRAY_NAME.fullmatch(name):
        raise ValueError("its name may hold small letters, digits and _ alone")
    try:
        known = msgspec.convert(array, _Array)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    shape, chunk = known.shape, known.chunk_grid.configuration.chunk_shape
    if not shape or not len(shape) == len(chunk) == len(known.dimension_names):
        raise ValueError(f"shape {shape}, chunks {chunk} and axes {known.dimension_names} do not fit")
    if name in COORDINATE_AXES and known.dimension_names != [COORDINATE_AXES[name]]:
        raise ValueError(f"axes {known.dimension_names}; it has the axis {COORDINATE_AXES[name]} alone")
    if len(set(known.dimension_names)) != len(shape):
        raise ValueError(f"axes {known.dimension_names} are not apart")
    if tuple(chunk[1:]) != tuple(max(1, size) for size in shape[1:]):
        raise ValueError(f"files of shape {chunk} do not hold whole rows of shape {shape}")
    if shape[0] > MAX_FILES * chunk[0]:
        raise ValueError(f"{-(-shape[0] // chunk[0])} files, more than {MAX_FILES}")
    if math.prod(chunk) * np.dtype(known.data_type).itemsize > _MAX_FILE_BYTES:
        raise ValueError(f"files of shape {chunk} are too large")
    _check_codecs(known, chunk)


def _check_codecs(array: _Array, chunk: list[int]) -> None:
    names = [codec.name for codec in array.codecs]
    if array.storage_transformers:
        raise ValueError("it has storage transformers")
    if names == ["bytes", "zstd"]:
        return
    if names != ["sharding_indexed"]:
        raise ValueError(f"codecs {', '.join(names)}")
    try:
        sharding = msgspec.convert(array.codecs[0].configuration, _Sharding)
    except msgspec.ValidationError as error:
        raise ValueError(f"sharding: {error}") from None
    inner = [codec.name for codec in sharding.codecs]
    if inner not in (["bytes"], ["bytes", "blosc"]):
        raise ValueError(f"codecs {', '.join(inner)} in shards")
    if [codec.name for codec in sharding.index_codecs] != ["bytes", "crc32c"]:
        raise ValueError("another index of shards")
    if len(sharding.chunk_shape) != len(chunk) or any(
        whole % part for whole, part in zip(chunk, sharding.chunk_shape, strict=True)
    ):
        raise ValueError(f"chunks {sharding.chunk_shape} do not make up shards {chunk}")
