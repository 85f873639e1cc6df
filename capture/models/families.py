"""Checkpoints that this project knows, by the `model_type` of their config.json.

A family is a reading of the config, with the names of the tensors beside it, as a description, and a list of
every tensor that the files must hold. The list is exact; a checkpoint with one tensor more or less is another
wiring, and is refused by `checkpoint.py`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ...errors import ModelError
from . import huggingface, raven
from .config import Config
from .description import Description
from .sources import Copy, Source


@dataclass(frozen=True)
class Family:
    describe: Callable[[Config, Collection[str]], Description]
    """Makes the description from the config and the names of all tensors."""
    sources: Callable[[Description], list[Source]] = huggingface.list_sources
    copies: Callable[[Description], list[Copy]] = huggingface.list_copies


FAMILIES: dict[str, Family] = {
    "huginn_raven": Family(raven.read_raven, raven.list_sources, raven.list_copies),
    "llama": Family(huggingface.read_llama),
    "olmo2": Family(huggingface.read_olmo2),
    "ouro": Family(huggingface.read_ouro),
    "qwen2": Family(huggingface.read_qwen2),
    "qwen3": Family(huggingface.read_qwen3),
}


def find_family(config: Config) -> tuple[str, Family]:
    """Returns the `model_type` of a config, and the family of that name.

    Raises:
        ModelError: another one; lists those that are known.
    """
    kind = config.fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{config.path}: model_type {kind!r} is not known; looptap reads {', '.join(FAMILIES)}"
        )
    return kind, FAMILIES[kind]
