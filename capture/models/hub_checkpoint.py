"""Models of the Hub as checkpoints, which are checked before their weights are fetched.

The headers of the weights come first, by ranged reads: a model that cannot be run is refused, and `looptap
info` answers, before gigabytes are fetched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import ModelError
from .checkpoint import CheckedHeaders, Checkpoint, check_headers, open_checkpoint, read_config
from .description import Description
from .hub import Snapshot, fetch_model, fetch_weights, lacking, one_message
from .model import LoopedModel
from .other_files import tokenizer_files
from .stored_tensors import TensorHeader, read_header, read_headers

if TYPE_CHECKING:
    from huggingface_hub.utils import TensorInfo


@dataclass(frozen=True)
class HubCheckpoint:
    """A checked model of the Hub; its weights are fetched when they are first needed."""

    snapshot: Snapshot
    headers: CheckedHeaders
    num_bytes: int
    """Bytes of the weights that were not in the cache when the headers were read."""

    @property
    def name(self) -> str:
        return self.snapshot.id

    @property
    def spec(self) -> str:
        """The id with the commit, which names these files for good whatever the revision was."""
        return f"{self.snapshot.id}@{self.snapshot.commit}"

    @property
    def description(self) -> Description:
        return self.headers.description

    @property
    def dtype(self) -> torch.dtype:
        return self.headers.dtype

    @property
    def tokenizer_files(self) -> list[Path]:
        return tokenizer_files(self.snapshot.path)

    @property
    def weights_sha256(self) -> str:
        """Hash over the weights, the same as that of a directory with these files."""
        return self._fetched.weights_sha256

    def load(self, description: Description, device: str, dtype: torch.dtype) -> LoopedModel:
        """Fetches the weights that are missing, and loads them as `Checkpoint.load` does."""
        return self._fetched.load(description, device, dtype)

    @cached_property
    def _fetched(self) -> Checkpoint:
        fetch_weights(self.snapshot, self.num_bytes)
        return open_checkpoint(self.snapshot.path)


def open_hub(spec: str) -> HubCheckpoint:
    """Looks a model up and checks it from its headers; weights stay where they are.

    Raises:
        ModelError: what `fetch_model` and `open_checkpoint` refuse.
    """
    snapshot, sizes = fetch_model(spec), {}

    def read_either_header(path: Path) -> Sequence[TensorHeader]:
        if path.is_file():
            return read_header(path)
        header = _read_remote_header(snapshot, path.name)
        sizes[path.name] = max((info.data_offsets[1] for info in header.values()), default=0)
        return [TensorHeader(name, path, tuple(info.shape), info.dtype) for name, info in header.items()]

    try:
        headers = check_headers(read_config(snapshot.path), read_headers(snapshot.path, read_either_header))
    except ModelError as error:
        raise type(error)(str(error).replace(str(snapshot.path), snapshot.id)) from error
    return HubCheckpoint(snapshot, headers, sum(sizes.values()))


def _read_remote_header(snapshot: Snapshot, name: str) -> dict[str, "TensorInfo"]:
    """Reads the header of a file of the Hub, by ranged reads."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    with one_message(snapshot.id):
        try:
            found = HfApi().parse_safetensors_file_metadata(snapshot.id, name, revision=snapshot.commit)
        except EntryNotFoundError:
            raise lacking(snapshot.id, name, snapshot.commit) from None
    return found.tensors
