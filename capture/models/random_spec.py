"""Randomly initialised models, for the paper's architecture study and for trying things without a download.

`random:(0,12x32,0)I,norm=pre,width=256,heads=4,seed=0`: the paper's notation, then options. Embeddings and
the initial state are standard normal, every other matrix is normal with standard deviation gain/√width, norm
weights are 1, SwiGLU is four times the width, tokens are bytes.
Scale decides what such a model does: with gain 0.64, or embeddings of 0.02, pre-norm with injection no longer
    converges.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch

from ...errors import DescriptionError, ModelSpecError
from .description import NORMS, Block, Description
from .loop_schedule import prelude_core_coda
from .model import LoopedModel

MAX_WIDTH = 2**20
_LOOP = re.compile(r"random:\((\d+),(\d+)(?:x(\d+))?,(\d+)\)(I?)(?:,(.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class RandomOptions:
    """The options that may follow the loop in a spec."""

    norm: str = "pre"
    width: int = 256
    """Channels."""
    heads: int = 4
    seed: int = 0
    gain: float = 0.32
    """Standard deviation of the matrices, times √width."""
    embedding_std: float = 1.0
    positions: int = 65_536
    """Longest sequence, tokens."""


@dataclass(frozen=True)
class RandomModel:
    """A randomly initialised model whose spec was read; `load` draws its weights."""

    name: str
    description: Description
    options: RandomOptions
    dtype: torch.dtype = torch.float32
    tokenizer_files: Sequence[Path] = ()  # bytes

    @cached_property
    def weights_sha256(self) -> str:
        """Hash over the drawn parameters, so that another generator of random numbers shows."""
        digest = hashlib.sha256()
        for parameter in self.load(self.description, "cpu", torch.float32).parameters():
            digest.update(parameter.numpy().data)
        return digest.hexdigest()

    def load(self, description: Description, device: str, dtype: torch.dtype) -> LoopedModel:
        """Draws the weights in float32 on the CPU, so that they are the same for every device and dtype."""
        model = LoopedModel(description)
        generator = torch.Generator().manual_seed(self.options.seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = self.options.gain * description.width**-0.5
                parameter.normal_(
                    0, self.options.embedding_std if name == "embedding" else std, generator=generator
                )
        return model.to(device=device, dtype=dtype).eval()


def parse_random(spec: str) -> RandomModel:
    """Reads a `random:` spec.

    Raises:
        ModelSpecError: not of the form above; says what is wrong and shows a right one.
    """
    match = _LOOP.fullmatch(spec)
    if match is None:
        raise ModelSpecError(
            f"{spec!r} is not a random model; write for example random:(0,12x32,0)I,norm=pre,width=256"
        )
    prelude, core, recurrences, coda, injection, rest = match.groups()
    options = _read_options(rest or "")
    if options.norm not in NORMS:
        raise ModelSpecError(f"norm={options.norm} is not known; choose one of {', '.join(NORMS)}")
    if not 0 < options.width <= MAX_WIDTH:
        raise ModelSpecError(f"width={options.width} is not from 1 to {MAX_WIDTH}")
    if options.width % options.heads:
        raise ModelSpecError(f"width={options.width} is no multiple of heads={options.heads}")
    times = int(recurrences) if recurrences else int(int(core) > 0)
    try:
        description = Description(
            phases=prelude_core_coda(int(prelude), int(core), times, int(coda)),
            width=options.width,
            num_heads=options.heads,
            num_kv_heads=options.heads,
            head_width=options.width // options.heads,
            mlp_width=4 * options.width,
            vocab_size=256,
            max_positions=options.positions,
            block=Block(norm=options.norm),
            injection="linear" if injection else None,
            initial_state="normal" if injection else "prelude",
            recurrence_end="norm" if options.norm == "ouro" and int(core) else None,
            norm_before_coda=options.norm == "huginn" and int(core) > 0,
        )
    except DescriptionError as error:
        raise ModelSpecError(f"{spec!r}: {error}") from error
    return RandomModel(spec.removeprefix("random:"), description, options)


def _read_options(text: str) -> RandomOptions:
    types = {field.name: type(field.default) for field in fields(RandomOptions)}
    given = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if name not in types or not equals:
            raise ModelSpecError(
                f"{item!r} is no option of a random model; they are {', '.join(types)}, each as name=value"
            )
        if name in given:
            raise ModelSpecError(f"{name} is given twice")
        try:
            given[name] = types[name](value)
        except ValueError:
            raise ModelSpecError(f"{name}={value} is no {types[name].__name__}") from None
        if name == "seed" and not 0 <= given[name] < 2**64:
            raise ModelSpecError(f"seed={value} must be a whole number from 0 to 2**64 - 1")
        if types[name] is not str and name != "seed" and not 0 < given[name] < float("inf"):
            raise ModelSpecError(f"{name}={value} must be positive and finite")
    return RandomOptions(**given)
