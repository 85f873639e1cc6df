"""Tensors as they lie in safetensors files: found by their headers, read in pieces.

A mapped file counts as this process's memory for as long as it is open, a whole shard of it; reading into one
small buffer does not. safetensors itself checks the headers: that they are sound, without gaps or overlaps,
and that the file is as long as they say.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ModelError, ModelMissingError, os_errors_named
from .other_files import INDEX, SINGLE, refuse_other_files, two_sets

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PIECE_BYTES = 2**21


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as the header of its file describes it; the file may lie elsewhere yet."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors; `DTYPES` has those that are read."""


@dataclass(frozen=True)
class StoredTensor(TensorHeader):
    """One tensor of a file that is here; its numbers are read by `pieces`."""

    first_byte: int
    """Offset of the first byte from the start of the file."""

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Reads the numbers in order, a piece [n] at a time; yields the place of each among them, and the
        piece.

        A piece is good until the next one is asked for.

        Raises:
            ModelError: the file has become shorter.
        """
        dtype, size = DTYPES[self.dtype], prod(self.shape)
        step = _PIECE_BYTES // dtype.itemsize
        buffer = torch.empty(min(step, size), dtype=dtype)
        raw = buffer.view(torch.uint8).numpy().data
        with os_errors_named(self.path, "read"), self.path.open("rb") as file:
            file.seek(self.first_byte)
            for start in range(0, size, step):
                piece = buffer[: min(step, size - start)]
                if file.readinto(raw[: piece.nbytes]) != piece.nbytes:
                    raise ModelError(f"{self.path} was cut short while {self.name} was read")
                yield slice(start, start + len(piece)), piece

    def check(self, piece: Tensor, limit: float = float("inf")) -> None:
        """Refuses a piece that is not of finite numbers, or holds one above the limit.

        Raises:
            ModelError: names the tensor and the file.
        """
        low, high = (value.item() for value in piece.aminmax())  # both NaN where there is one
        peak = max(-low, high)
        if not peak < float("inf"):
            raise ModelError(f"{self.path}: {self.name} holds {'infinite values' if peak == peak else 'NaN'}")
        if peak > limit:
            raise ModelError(
                f"{self.path}: {self.name} holds {peak:.6g}, and {limit:.6g} is the most that the chosen "
                "dtype takes; choose bfloat16 or float32"
            )


Header = TypeVar("Header", bound=TensorHeader)


def read_headers(path: Path, read_header: Callable[[Path], Sequence[Header]]) -> dict[str, Header]:
    """Reads the headers of a directory's weights, in one file or in the shards that its index names.

    Args:
        path: the directory.
        read_header: returns the tensors of one of its files.

    Raises:
        ModelError: files missing, damaged, cut short or contradictory.
    """
    if path.is_dir():
        refuse_other_files(str(path), os.listdir(path))
    index_path = path / INDEX
    weight_map, files = None, [SINGLE]
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index_path} has no weight_map")
        named = list(weight_map.values())
        if strange := [name for name in named if name in ("", "..") or Path(str(name)).name != name]:
            raise ModelError(f"{index_path} names {strange[0]!r}, which is no file of this directory")
        files = sorted(set(named))
        if SINGLE not in files and (path / SINGLE).is_file():
            raise two_sets(str(path))
    found: dict[str, Header] = {}
    for name in files:
        try:
            tensors = read_header(path / name)
        except FileNotFoundError:
            if weight_map is None:
                raise ModelMissingError(f"{path} holds neither {name} nor {index_path.name}") from None
            raise ModelMissingError(f"{path / name} is missing, and {index_path.name} names it") from None
        for tensor in tensors:
            if (twice := found.get(tensor.name)) is not None:
                raise ModelError(f"{path}: {tensor.name} is in both {twice.path.name} and {name}")
            found[tensor.name] = tensor
    if weight_map is not None and (lost := [t for t in weight_map if t not in found]):
        raise ModelError(f"{path}: the index names tensors that no shard holds: {listed(lost)}")
    return found


def read_header(path: Path) -> list[StoredTensor]:
    """Reads the header of one safetensors file; returns its tensors.

    Raises:
        FileNotFoundError: no such file.
        ModelError: damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt") as checked:
            names = list(checked.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short ({path.stat().st_size} bytes): {error}") from error
    return [
        StoredTensor(
            name,
            path,
            tuple(header[name]["shape"]),
            header[name]["dtype"],
            8 + length + header[name]["data_offsets"][0],
        )
        for name in names
    ]


def hash_and_check(path: Path, tensors: list[StoredTensor]) -> bytes:
    """Returns the SHA-256 of a file; all of its tensors are checked for finite numbers on the way."""
    tensors = sorted(tensors, key=lambda tensor: tensor.first_byte)
    digest = hashlib.sha256()
    with os_errors_named(path, "read"), path.open("rb") as file:
        digest.update(file.read(tensors[0].first_byte))
    for tensor in tensors:  # they follow on one another, to the end of the file
        for _, piece in tensor.pieces():
            tensor.check(piece)
            digest.update(piece.view(torch.uint8).numpy().data)
    return digest.digest()


def read_json(path: Path) -> dict[str, object]:
    """Reads the object in a JSON file.

    Raises:
        ModelError: no such file, or something else in it.
    """
    try:
        with os_errors_named(path, "read"):
            fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelMissingError(
            f"{path} is missing; a model directory holds config.json and *.safetensors"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds a {type(fields).__name__}, not an object of fields")
    return fields


def listed(names: list[str], shown: int = 6) -> str:
    """Returns the first of the names, and how many more there are, as text."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
