"""Checkpoints that this project knows, by the `model_type` of their config.json.

A family is a reading of the config, with the names of the tensors beside it, as a description, and a list of
every tensor that the files must hold. The list is exact; a checkpoint with one tensor more or less is another
wiring, and is refused by `checkpoint.py`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ...errors import ModelError, shown
from . import huggingface, raven
from .config import Config
from .description import Description
from .harmless_fields import COMMON, OURO, QWEN, RAVEN
from .sources import Copy, Source
from .stored_tensors import listed


@dataclass(frozen=True)
class Family:
    describe: Callable[[Config, Collection[str]], Description]
    """Makes the description from the config and the names of all tensors."""
    classes: str
    """Names of the authors' class without ForCausalLM or Model, divided by blanks."""
    has_own_code: bool = False
    """Whether the authors' code comes with the weights: `auto_map` then names it, and nothing else."""
    harmless: frozenset[str] = frozenset()
    """Fields of config.json that change no forward pass of this family, besides the common ones."""
    sources: Callable[[Description], list[Source]] = huggingface.list_sources
    copies: Callable[[Description], list[Copy]] = huggingface.list_copies

    def read(self, config: Config, names: Collection[str]) -> Description:
        """Returns the description that a config makes with the tensors of these names.

        Raises:
            ModelError: another wiring, or a field that may make one.
        """
        if config.value("quantization_config") is not None:
            raise ModelError(
                f"{config.path}: quantization_config says that the weights are quantised; looptap reads "
                "plain float32, bfloat16 and float16 weights: capture the model that they were made from"
            )
        config.must_be("is_causal", True)
        description = self.describe(config, names)
        self._check_class(config)
        config.refuse_unread(COMMON | self.harmless)
        return description

    def _check_class(self, config: Config) -> None:
        """Refuses the config of another class, and code that stands in for the authors'."""
        known = {name + kind for name in self.classes.split() for kind in ("ForCausalLM", "Model")}
        classes, code = config.value("architectures") or [], config.value("auto_map") or {}
        if not isinstance(classes, list) or set(map(str, classes)) - known:
            raise ModelError(
                f"{config.path}: architectures is {shown(classes)}; of this model_type "
                f"{listed(sorted(known))} are known here"
            )
        if not isinstance(code, dict):
            raise ModelError(f"{config.path}: auto_map must be an object, got {shown(code)}")
        models = {key: str(name) for key, name in code.items() if key.startswith("AutoModel")}
        strange = [
            f"{key} ({shown(name)})"
            for key, name in models.items()
            if not self.has_own_code or name.rpartition(".")[2] not in known
        ]
        if strange:
            raise ModelError(
                f"{config.path}: auto_map gives this model code of its own, {listed(strange)}, which looptap "
                "does not run; if it computes what the authors' class does, remove the field from a copy of "
                "the directory and capture that"
            )


FAMILIES: dict[str, Family] = {
    "huginn_raven": Family(raven.read_raven, "Raven", True, RAVEN, raven.list_sources, raven.list_copies),
    "llama": Family(huggingface.read_llama, "Llama LLaMA"),
    "olmo2": Family(huggingface.read_olmo2, "Olmo2"),
    "ouro": Family(huggingface.read_ouro, "Ouro", True, OURO),
    "qwen2": Family(huggingface.read_qwen2, "Qwen2", harmless=QWEN),
    "qwen3": Family(huggingface.read_qwen3, "Qwen3", harmless=QWEN),
}


def find_family(config: Config) -> tuple[str, Family]:
    """Returns the `model_type` of a config, and the family of that name.

    Raises:
        ModelError: another one; lists those that are known.
    """
    kind = config.value("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{config.path}: model_type {shown(kind)} is not known; looptap reads {', '.join(FAMILIES)}"
        )
    return kind, FAMILIES[kind]
