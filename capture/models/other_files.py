"""Files beside config.json and the weights: a tokenizer's, and those that make another model of the weights,
which are refused by name.
"""

from collections.abc import Collection
from pathlib import Path

from ...errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What may change a tokenizer beside its model."""
TOKENIZER_MODELS = ("tokenizer.model", "vocab.json", "merges.txt")
"""What a tokenizer is made of where there is no tokenizer.json."""

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a directory that make its tokenizer, its model first; none if there is none."""
    models = [name for name in ("tokenizer.json", *TOKENIZER_MODELS) if (folder / name).is_file()]
    if not models:
        return []
    models = models[:1] if models[0] == "tokenizer.json" else models
    return [folder / name for name in (*models, *TOKENIZER_EXTRAS) if (folder / name).is_file()]


def refuse_other_files(where: str, names: Collection[str]) -> None:
    """Refuses a directory or repository that holds more than one model's files.

    Args:
        where: begins the messages.
        names: its files.
    Raises:
        ModelError: names the file, and what to do.
    """
    if found := [name for name in ADAPTERS if name in names]:
        raise ModelError(
            f"{where} holds an adapter beside the weights ({', '.join(found)}), which other programs add to "
            "them and looptap does not: merge it into them (with peft: merge_and_unload, then "
            "save_pretrained) and capture that, or capture a copy without it"
        )
    if found := [name for name in QUANTISED if name in names]:
        raise ModelError(
            f"{where} holds {found[0]}, so its weights are quantised; looptap reads plain float32, bfloat16 "
            "and float16 weights: capture the model that they were made from"
        )


def two_sets(where: str) -> ModelError:
    """Returns the error for a directory with two sets of weights."""
    return ModelError(
        f"{where} holds two sets of weights, {SINGLE} and the files that {INDEX} names; programs differ in "
        "which they load: keep one of them"
    )
