"""Finds and loads the model that a user writes as MODEL: a random: spec, a directory, or a Hub id."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...errors import ModelMissingError, ModelSpecError, ModelTooLargeError
from .checkpoint import Checkpoint, open_checkpoint
from .description import Description
from .hub import FORMS
from .hub_checkpoint import HubCheckpoint, open_hub
from .model import LoopedModel
from .random_spec import RandomModel, parse_random

_WINDOW = re.compile(r"(\d+)-(\d+)x(\d+)")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and checked, with the loop to run; its weights are not loaded yet."""

    spec: str
    origin: Checkpoint | HubCheckpoint | RandomModel
    description: Description

    def load(self, device: str = "cpu", dtype: str = "auto") -> LoopedModel:
        """Returns the model with its weights; dtype "auto" is the one they are stored in."""
        self.check_memory(device, dtype)
        return self.origin.load(self.description, device, DTYPES[self.resolve_dtype(dtype)])

    def check_memory(self, device: str, dtype: str) -> None:
        """Raises ModelTooLargeError if the weights are to be on the CPU, and its memory cannot hold them."""
        name = self.resolve_dtype(dtype)
        num_bytes = self.num_parameters * DTYPES[name].itemsize
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if device == "cpu" and num_bytes > memory_bytes:
            raise ModelTooLargeError(
                f"{self.spec} has {num_bytes / 2**30:,.1f} GiB of weights in {name}, and "
                f"this machine's memory is {memory_bytes / 2**30:,.1f} GiB"
            )

    def resolve_dtype(self, dtype: str) -> str:
        """Returns the name of a dtype; "auto" stands for the one that weights are stored in."""
        wanted = self.origin.dtype if dtype == "auto" else DTYPES[dtype]
        return str(wanted).removeprefix("torch.")

    @property
    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in LoopedModel(self.description).parameters())

    def identity(self) -> dict[str, object]:
        """Returns what a plan records of the model, as JSON, with all of its description."""
        return {
            "name": self.origin.name,
            "spec": self._lasting_spec,
            "notation": self.description.notation,
            "norm": self.description.block.norm,
            **self.description.document(),
            "num_parameters": self.num_parameters,
            "weights_sha256": self.origin.weights_sha256,
        }

    @property
    def title(self) -> str:
        """Name of the model for people, with the commit where there are several."""
        if isinstance(self.origin, HubCheckpoint):
            return f"{self.origin.name}@{self.origin.snapshot.commit[:8]}"
        return self.origin.name

    @property
    def _lasting_spec(self) -> str:
        """A spec that finds the same model again, anywhere and at any time, as far as there is one."""
        if isinstance(self.origin, HubCheckpoint):
            return self.origin.spec
        # a directory's path is one machine's own, and the hash of its weights says what was in it
        return self.spec if isinstance(self.origin, RandomModel) else self.origin.name


def find_model(
    spec: str | os.PathLike[str], loop: str | None = None, recurrences: int | None = None
) -> ModelSource:
    """Finds and checks a model without loading its weights.

    Args:
        spec: a directory, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `random:...`; a directory of the
            name goes before the Hub.
        loop: window of a feedforward model's layers to repeat, first-lastxtimes, both layers included.
        recurrences: passes through the core instead of the model's own number.
    Raises:
        ModelError: none of these; see `open_checkpoint`, `open_hub` and `parse_random`; also a loop or count
            that the model cannot run.
    """
    spec = os.fspath(spec)
    if spec.startswith("random:"):
        origin = parse_random(spec)
    elif os.path.isdir(spec):  # also False where it cannot be looked at
        origin = open_checkpoint(Path(spec))
    elif os.path.exists(spec):
        raise ModelSpecError(f"{spec!r} is a file; {FORMS}")
    elif spec.startswith((".", "/", "~")) or spec.endswith("/") or spec.partition("@")[0].count("/") > 1:
        raise ModelMissingError(f"there is no directory {spec!r}; {FORMS}")
    elif "/" not in spec.partition("@")[0]:
        raise ModelMissingError(
            f"{spec!r} is no directory here, and a Hub id has an ORG/ before its NAME; {FORMS}"
        )
    else:
        origin = open_hub(spec)
    description = origin.description
    if loop is not None and recurrences is not None:
        raise ModelSpecError(f"--loop {loop} says how often already; leave --recurrences {recurrences} out")
    if loop is not None:
        if (match := _WINDOW.fullmatch(loop)) is None:
            raise ModelSpecError(f"--loop {loop!r} must read first-lastxtimes, for example 10-19x8")
        description = description.with_loop(*map(int, match.groups()))
    if recurrences is not None:
        description = description.with_recurrences(recurrences)
    return ModelSource(spec, origin, replace(description))


def load_model(
    spec: str | os.PathLike[str],
    *,
    loop: str | None = None,
    recurrences: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> LoopedModel:
    """Finds a model as `find_model` does and loads its weights."""
    return find_model(spec, loop, recurrences).load(device, dtype)
