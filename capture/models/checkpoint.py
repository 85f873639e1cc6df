"""A checkpoint directory: config.json, safetensors in one file or in shards, perhaps tokenizer.json.

Everything is checked from the files' headers before a weight is read: the tensors there must be exactly those
of one known wiring. Weights then stream piece by piece into the model's own parameters. No pickle is opened
and no code of the directory is run.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...errors import DescriptionError, ModelError
from .config import Config
from .description import Description
from .families import find_family
from .model import LoopedModel, rotary_frequencies, rotary_table
from .other_files import tokenizer_files
from .sources import COMPUTED, Copy, Source
from .stored_tensors import (
    DTYPES,
    StoredTensor,
    TensorHeader,
    hash_and_check,
    listed,
    read_header,
    read_headers,
    read_json,
)


@dataclass(frozen=True)
class CheckedHeaders:
    """What the config and the headers of a model say, which was found to fit together."""

    description: Description
    """The model as its files describe it; a caller may add a loop or another recurrence count."""
    sources: tuple[Source, ...]
    copies: tuple[Copy, ...]
    """Tensors of the files that repeat what is known without them."""
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint(CheckedHeaders):
    """A checked directory; nothing but headers was read so far."""

    path: Path
    tensors: dict[str, StoredTensor]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def tokenizer_files(self) -> list[Path]:
        return tokenizer_files(self.path)

    @cached_property
    def weights_sha256(self) -> str:
        """Hash over the safetensors files in name order.

        Their numbers are checked on the way as by `load`: a plan asks for the hash, so what is wrong with
        them is known before a store is made.
        """
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(hash_and_check(path, [t for t in self.tensors.values() if t.path == path]))
        self._check_copies()
        return digest.hexdigest()

    def load(self, description: Description, device: str, dtype: torch.dtype) -> LoopedModel:
        """Streams the weights to the device; extra host memory is one buffer of a few MiB.

        Raises:
            ModelError: values that are not finite or that the dtype cannot hold, or a tensor that repeats
                another one and differs from it; names the tensor and its file.
        """
        with torch.device("meta"):
            model = LoopedModel(description).to(dtype)
        model = model.to_empty(device=device)
        parameters, limit = dict(model.named_parameters()), torch.finfo(dtype).max
        for source in sorted(self.sources, key=lambda source: str(self.tensors[source.tensor].path)):
            tensor, parameter = self.tensors[source.tensor], parameters[source.parameter]
            row_size = parameter[0].numel()
            target = parameter.flatten()[source.first_row * row_size :]
            for place, piece in tensor.pieces():
                tensor.check(piece, limit)
                target[place].copy_(piece)
        self._check_copies()
        return model.eval()

    @property
    def _paths(self) -> list[Path]:
        return sorted({tensor.path for tensor in self.tensors.values()})

    def _check_copies(self) -> None:
        """Refuses tensors that repeat what is known without them, and say otherwise."""
        for copy in self.copies:
            tensor = self.tensors[copy.tensor]
            if copy.of in COMPUTED:
                self._check_rotary(tensor, copy.of)
                continue
            both = zip(tensor.pieces(), self.tensors[copy.of].pieces(), strict=True)
            if not all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in both):
                raise ModelError(
                    f"{tensor.path}: {copy.tensor} differs from {copy.of}, of which config.json makes it a "
                    "copy; a head of its own needs the config to say that it is not tied"
                )

    def _check_rotary(self, tensor: StoredTensor, kind: str) -> None:
        d = self.description
        if kind == "rotary table":
            table = rotary_table(d.block.rotary, d.head_width, torch.arange(d.max_positions))
            wanted = torch.stack(table, -1).flatten()
            # angles up to max_positions were rounded to float32, and the table may have been bfloat16 once
            allowed = d.max_positions * 2**-20 + 2**-8
        else:
            wanted = rotary_frequencies(d.block.rotary, d.head_width, torch.device("cpu"))
            allowed = 2**-8
        for place, piece in tensor.pieces():
            error = (piece.float() - wanted[place]).abs().max().item()
            if not error <= allowed:  # NaN is not
                raise ModelError(
                    f"{tensor.path}: {tensor.name} holds other {kind.replace('table', 'angles')} than "
                    f"config.json's base gives; they are off by {error:.3g}"
                )


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the config and the headers of a directory.

    Raises:
        ModelError: anything missing, damaged, contradictory or of an unknown wiring; names the file and
            tensors.
    """
    config = read_config(path)
    tensors = read_headers(path, read_header)
    return Checkpoint(**vars(check_headers(config, tensors)), path=path, tensors=tensors)


def read_config(path: Path) -> Config:
    """Reads config.json of a directory.

    Raises:
        ModelError: as `read_json`.
    """
    return Config(path / "config.json", read_json(path / "config.json"))


def check_headers(config: Config, tensors: Mapping[str, TensorHeader]) -> CheckedHeaders:
    """Holds the tensors of a model to its config.

    Raises:
        ModelError: contradictory or of an unknown wiring; names the file and tensors.
    """
    path = config.path.parent
    kind, family = find_family(config)
    try:
        description = family.read(config, tensors.keys())
    except DescriptionError as error:
        raise ModelError(f"{config.path}: {error}") from error
    sources = family.sources(description)
    copies = [copy for copy in family.copies(description) if copy.tensor in tensors]
    _check_tensors(path, kind, [*sources, *copies], tensors)
    computed = {copy.tensor for copy in copies if copy.of in COMPUTED}
    dtype = _common_dtype(path, tensors, computed)
    return CheckedHeaders(description, tuple(sources), tuple(copies), dtype)


def _check_tensors(
    path: Path, kind: str, wanted: list[Source | Copy], tensors: Mapping[str, TensorHeader]
) -> None:
    """Refuses a set of tensors, or shapes of them, other than the wanted."""
    shapes = {source.tensor: source.shape for source in wanted}
    problems = []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"missing {listed(missing)}")
    if extra := [f"{name} (in {t.path.name})" for name, t in tensors.items() if name not in shapes]:
        problems.append(f"not known {listed(extra)}")
    if others := list(_other_shapes(shapes, tensors)):
        problems.append(listed(others))
    if problems:
        raise ModelError(
            f"{path}: its tensors are not those of a {kind} model with this config: {'; '.join(problems)}"
        )


def _other_shapes(shapes: dict[str, tuple[int, ...]], tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    for name, shape in shapes.items():
        if name in tensors and (found := tensors[name]).shape != shape:
            says = f"{name} is {list(found.shape)} where the config says {list(shape)}"
            yield f"{says} (in {found.path.name})"


def _common_dtype(path: Path, tensors: Mapping[str, TensorHeader], computed: set[str]) -> torch.dtype:
    """Returns the dtype of all matrices; vectors and what is computed may be float32 beside narrower ones."""
    counts = Counter(tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1)
    counts -= Counter(tensors[name].dtype for name in computed if len(tensors[name].shape) > 1)
    common = max(counts, key=lambda name: counts[name])
    odd = [
        tensor
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES
        or not (
            tensor.dtype == common or name in computed or (len(tensor.shape) == 1 and tensor.dtype == "F32")
        )
    ]
    if not odd and common in DTYPES:
        return DTYPES[common]
    found = sorted({tensor.dtype for tensor in tensors.values()})
    strange = odd[0].dtype if odd else common
    names = [f"{tensor.name} (in {tensor.path.name})" for tensor in odd if tensor.dtype == strange]
    raise ModelError(
        f"{path}: tensors are {', '.join(found)}; one of {', '.join(DTYPES)} is wanted for all weights, "
        f"and {strange} is {listed(names)}"
    )
