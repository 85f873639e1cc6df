"""A checkpoint directory: config.json, safetensors in one file or in shards, perhaps tokenizer.json.

Everything is checked from the files' headers before a weight is read: the tensors there must be exactly those
of one known wiring. Weights then stream one tensor at a time into the model's own parameters. No pickle is
opened and no code of the directory is run.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .description import Description
from .families import FAMILIES, Config, ModelError, Source
from .model import LoopedModel

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHOWN = 6  # how many names an error lists before it says how many more there are


@dataclass(frozen=True)
class Checkpoint:
    """A checked directory; nothing but headers was read so far."""

    path: Path
    description: Description
    """As the files say it; a loop or another recurrence count is the caller's to add."""
    sources: tuple[Source, ...]
    file_of: dict[str, Path]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def tokenizer_path(self) -> Path | None:
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None

    @cached_property
    def weights_sha256(self) -> str:
        """Hash over the safetensors files in name order."""
        digest = hashlib.sha256()
        for path in sorted(set(self.file_of.values())):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def load(self, description: Description, device: str, dtype: torch.dtype) -> LoopedModel:
        """Streams the weights to the device; extra host memory is one tensor."""
        with torch.device("meta"):
            model = LoopedModel(description).to(dtype)
        model = model.to_empty(device=device)
        parameters = dict(model.named_parameters())
        for path in sorted(set(self.file_of.values())):
            with safe_open(path, framework="pt") as file:
                for source in self.sources:
                    if self.file_of[source.tensor] == path:
                        rows = slice(source.first_row, source.first_row + source.shape[0])
                        parameters[source.parameter][rows].copy_(file.get_tensor(source.tensor))
        return model.eval()


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the config and the headers of a directory.

    Raises:
        ModelError: anything missing, damaged, contradictory or of an unknown wiring; names the file and
            tensors.
    """
    config = _read_config(path / "config.json")
    kind = config.fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{config.path}: model_type {kind!r} is not known; looptap reads {', '.join(sorted(FAMILIES))}"
        )
    try:
        description = FAMILIES[kind].read_config(config)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{config.path}: {error}") from error
    headers = _read_headers(path)
    sources = FAMILIES[kind].sources(description)
    _check_tensors(path, kind, sources, headers)
    dtypes = {dtype for _, _, dtype in headers.values()}
    if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
        raise ModelError(
            f"{path}: tensors are {', '.join(sorted(dtypes))}; one of {', '.join(_DTYPES)} is wanted"
        )
    return Checkpoint(
        path=path,
        description=description,
        sources=tuple(sources),
        file_of={name: file for name, (file, _, _) in headers.items()},
        dtype=_DTYPES[dtypes.pop()],
    )


def _read_config(path: Path) -> Config:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing; a model directory holds config.json and *.safetensors"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds a {type(fields).__name__}, not an object of fields")
    return Config(path, fields)


def _read_headers(path: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and dtype name of every tensor."""
    index_path, single_path = path / "model.safetensors.index.json", path / "model.safetensors"
    if index_path.is_file():
        weight_map = _read_config(index_path).fields.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index_path} has no weight_map")
        named = list(weight_map.values())
        if strange := [name for name in named if name in ("", "..") or Path(str(name)).name != name]:
            raise ModelError(f"{index_path} names {strange[0]!r}, which is no file of this directory")
        files = sorted(set(named))
    elif single_path.is_file():
        weight_map, files = None, [single_path.name]
    else:
        raise ModelError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    headers = {}
    for name in files:
        try:
            with safe_open(path / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    part = file.get_slice(tensor)
                    if tensor in headers:
                        raise ModelError(f"{path}: {tensor} is in both {headers[tensor][0].name} and {name}")
                    headers[tensor] = (path / name, tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError:
            raise ModelError(f"{path / name} is missing, and {index_path.name} names it") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path / name} is damaged or cut short ({path.joinpath(name).stat().st_size} bytes): {error}"
            ) from error
    if weight_map is not None and (lost := [t for t in weight_map if t not in headers]):
        raise ModelError(f"{path}: the index names tensors that no shard holds: {_listed(lost)}")
    return headers


def _check_tensors(
    path: Path, kind: str, sources: list[Source], headers: dict[str, tuple[Path, tuple[int, ...], str]]
) -> None:
    wanted = {source.tensor: source.shape for source in sources}
    problems = []
    if missing := [name for name in wanted if name not in headers]:
        problems.append(f"missing {_listed(missing)}")
    if extra := [name for name in headers if name not in wanted]:
        problems.append(f"not known {_listed(extra)}")
    if shapes := [
        f"{name} is {list(headers[name][1])} where the config says {list(shape)}"
        for name, shape in wanted.items()
        if name in headers and headers[name][1] != shape
    ]:
        problems.append(_listed(shapes))
    if problems:
        raise ModelError(
            f"{path}: its tensors are not those of a {kind} model with this config: {'; '.join(problems)}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
