"""The stored models of the authors' code, and checkpoints made from them."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from looptap.capture.models.tap import Packed

GOLDEN = Path(__file__).parent / "golden"
FEEDFORWARD = ("llama", "olmo2")
RAVEN = ("huginn", "retro-tinyllama", "retro-llama32", "retro-olmo2")
NAMES = (*FEEDFORWARD, "ouro", *RAVEN)
PADDED = (*FEEDFORWARD, "ouro")  # the others' code knows no padding

Tensors = dict[str, torch.Tensor]


@cache
def stored(name: str, kind: str) -> Tensors:
    """What the fixture holds as `inputs` or `reference`; not to be changed."""
    return load_file(GOLDEN / name / f"{kind}.safetensors")


def batch_of(name: str) -> tuple[Packed, torch.Tensor, torch.Tensor | None]:
    """The stored sequences, a mask of all their tokens, and their initial states if there are any."""
    inputs = stored(name, "inputs")
    S, T = inputs["input_ids"].shape
    states = inputs.get("input_states")
    initial_ND = None if states is None else states.flatten(0, 1)
    return Packed(inputs["input_ids"].flatten(), (T,) * S), torch.ones(S, T, dtype=torch.bool), initial_ND


def weights_of(name: str) -> Tensors:
    """Every tensor of a fixture's files, to do with as one likes."""
    paths = sorted((GOLDEN / name).glob("model*.safetensors"))
    return {key: tensor for path in paths for key, tensor in load_file(path).items()}


def config_of(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


def copy_model(
    name: str, directory: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config
) -> Path:
    """A fixture's files with other tensors or config fields; in its own shards, new tensors in the first."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config_of(name), **config}))
    tensors = weights_of(name)
    change(tensors)
    index_path = GOLDEN / name / "model.safetensors.index.json"
    if not index_path.exists():
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = json.loads(index_path.read_text())["weight_map"]
    first = min(weight_map.values())
    write_shards(directory, tensors, {key: weight_map.get(key, first) for key in tensors})
    return directory


def write_shards(directory: Path, tensors: Tensors, weight_map: dict[str, str]) -> None:
    for file in set(weight_map.values()):
        save_file({key: t for key, t in tensors.items() if weight_map[key] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def copy_whole(name: str, directory: Path) -> Path:
    """A fixture's model, byte for byte."""
    ignored = shutil.ignore_patterns("inputs*", "reference*", "README*")
    return Path(shutil.copytree(GOLDEN / name, directory, ignore=ignored))
