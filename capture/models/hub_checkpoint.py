"""Models of the Hub as checkpoints, which are checked before their weights are fetched.

The headers of the weights come first, by ranged reads: a model that cannot be run is refused, and `looptap
info` answers, before gigabytes are fetched.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...errors import ModelError
from .checkpoint import Checkpoint, open_checkpoint
from .description import Description
from .hub import CONFIG, INDEX, TOKENIZER, Snapshot, fetch_model, fetch_weights, lacking, one_message
from .model import LoopedModel


@dataclass(frozen=True)
class HubCheckpoint:
    """A checked model of the Hub; its weights are fetched when they are first needed."""

    snapshot: Snapshot
    headers: Checkpoint
    """The checkpoint as its headers describe it; weights cannot be loaded from it."""
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
    def tokenizer_path(self) -> Path | None:
        path = self.snapshot.path / TOKENIZER
        return path if path.is_file() else None

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
    snapshot = fetch_model(spec)
    if not snapshot.missing:
        return HubCheckpoint(snapshot, open_checkpoint(snapshot.path), 0)
    with tempfile.TemporaryDirectory() as directory:
        num_bytes = _write_stand_ins(snapshot, Path(directory))
        try:
            return HubCheckpoint(snapshot, open_checkpoint(Path(directory)), num_bytes)
        except ModelError as error:
            raise type(error)(str(error).replace(directory, snapshot.id)) from error


def _write_stand_ins(snapshot: Snapshot, directory: Path) -> int:
    """Puts the snapshot's files in a directory, with holes where weights are not in the cache yet.

    A hole in a file takes no disk, and the headers are checked by the code that checks any directory.

    Returns:
        the bytes that are holes.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    for name in (CONFIG, INDEX, *snapshot.weights):
        if (snapshot.path / name).is_file():
            (directory / name).symlink_to((snapshot.path / name).absolute())
    num_bytes = 0
    for name in snapshot.missing:
        with one_message(snapshot.id):
            try:
                found = HfApi().parse_safetensors_file_metadata(snapshot.id, name, revision=snapshot.commit)
            except EntryNotFoundError:
                raise lacking(snapshot.id, name, snapshot.commit) from None
        tensors = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in found.tensors.items()
        }
        header = json.dumps(tensors).encode()
        end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        with (directory / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        num_bytes += end
    return num_bytes
