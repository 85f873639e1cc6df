"""Models that cannot be run as they are given are refused by the name of what is wrong, before anything is
written; through the real command line, in this process, as importing torch takes seconds.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from looptap.cli.entry import main

Q_PROJ, K_PROJ = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "qk")


def change_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def test_a_sound_checkpoint_is_captured(model, tmp_path, monkeypatch):
    """What every case below starts from is right, so each is refused for its damage alone."""
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    arguments = ["capture", model, "--data", tmp_path / "ids.npy", "--store", tmp_path / "run.zarr"]
    monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


# 0, 4: less than the header's length takes; 8, 100: inside the header; the others: inside the data
@pytest.mark.parametrize("kept", [0, 4, 8, 100, 20_000, -4, -1])
def test_truncated_weights(message, model, kept):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    size = len(whole[:kept])
    assert f"{path} is damaged or cut short ({size} bytes)" in message(model)


TENSORS = {
    "missing": (lambda t: t.pop(K_PROJ), [f"missing {K_PROJ}"]),
    "half missing": (
        lambda t: [t.pop(name) for name in sorted(t)[::2]],
        ["missing model.embed_tokens.weight, ", "and 18 more"],
    ),
    "extra": (lambda t: t.update(extra=torch.zeros(2)), ["not known extra"]),
    "an untied head": (
        lambda t: t.update({"lm_head.weight": torch.zeros(256, 64)}),
        ["model.safetensors: lm_head.weight differs from model.embed_tokens.weight", "it is not tied"],
    ),
    "not a number": (
        lambda t: t[K_PROJ].view(-1)[700:701].fill_(float("nan")),
        [f"model.safetensors: {K_PROJ} holds NaN"],
    ),
    "a bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        ["not known model.layers.0.self_attn.q_proj.bias"],
    ),
    "transposed": (
        lambda t: t.update({K_PROJ: t[K_PROJ].T.contiguous()}),
        [f"{K_PROJ} is [64, 16] where the config says [16, 64]"],
    ),
    "renamed": (
        lambda t: t.update({"layers.2.k_proj": t.pop(K_PROJ)}),
        [f"missing {K_PROJ}", "not known layers.2.k_proj"],
    ),
    "mixed dtypes": (
        lambda t: t.update({K_PROJ: t[K_PROJ].bfloat16()}),
        ["tensors are BF16, F32", "one of F32, BF16, F16 is wanted"],
    ),
    "float64": (
        lambda t: t.update({name: value.double() for name, value in t.items()}),
        ["tensors are F64", "one of F32, BF16, F16 is wanted"],
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(message, model, case):
    change, wanted = TENSORS[case]
    change_tensors(model, change)
    said = message(model)
    assert str(model) in said and all(part in said for part in wanted), said


CONFIGS = {
    # another wiring than the one known here
    "model_type": (
        {"model_type": "mamba"},
        "model_type 'mamba' is not known; looptap reads huginn_raven, llama, ",
    ),
    "no model_type": ({"model_type": None}, "model_type None is not known"),
    "model_type of another type": ({"model_type": ["llama"]}, "model_type ['llama'] is not known"),
    "rope scaling": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rotary scaling 'yarn' is not known; default and llama3 are",
    ),
    "old rope scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rotary scaling 'linear' is not known",
    ),
    "rope scaling without factors": (
        {"rope_scaling": {"rope_type": "llama3"}},
        "the field rope_scaling.low_freq_factor is missing",
    ),
    "rope scaling of another type": (
        {"rope_scaling": "llama3"},
        "rope_scaling must be an object, got 'llama3'",
    ),
    "rope parameters of another type": (
        {"rope_parameters": [1]},
        "rope_parameters must be an object, got [1]",
    ),
    "rope theta": ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
    "newer rope theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "ten"}},
        "rope_theta must be a positive number, got 'ten'",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is known here"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True; only False is known here"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True; only False is known here"),
    # the tensors say otherwise
    "hidden_size": (
        {"hidden_size": 128},
        "model.embed_tokens.weight is [256, 64] where the config says [256, 128]",
    ),
    "fewer layers": ({"num_hidden_layers": 4}, "not known model.layers.4."),
    "more layers": ({"num_hidden_layers": 6}, "missing model.layers.5."),
    "vocab_size": (
        {"vocab_size": 250},
        "model.embed_tokens.weight is [256, 64] where the config says [250, 64]",
    ),
    "heads": ({"num_attention_heads": 4}, "q_proj.weight is [64, 64] where the config says [32, 64]"),
    "key heads": ({"num_key_value_heads": 4}, "k_proj.weight is [16, 64] where the config says [32, 64]"),
    "mlp": ({"intermediate_size": 100}, "gate_proj.weight is [176, 64] where the config says [100, 64]"),
    "untied": ({"tie_word_embeddings": False}, "missing lm_head.weight"),
    "another family": (
        {"model_type": "olmo2", "architectures": None},
        "not those of a olmo2 model with this config: missing ",
    ),
    # nothing that could be right
    "odd heads": ({"head_dim": 7}, "rotary positions need an even head width, got 7"),
    "heads that do not divide": (
        {"head_dim": None, "num_attention_heads": 7},
        "64 is no multiple of 7 attention heads",
    ),
    "key heads that do not divide": ({"num_key_value_heads": 3}, "8 query heads cannot share 3 key heads"),
    "missing field": ({"num_hidden_layers": None}, "the field num_hidden_layers is missing"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size must be a positive whole number, got '64'"),
    "fraction": ({"vocab_size": 256.5}, "vocab_size must be a positive whole number, got 256.5"),
    "yes for a number": (
        {"num_hidden_layers": True},
        "num_hidden_layers must be a positive whole number, got True",
    ),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, got 0"),
    "negative": ({"intermediate_size": -176}, "intermediate_size must be a positive whole number, got -176"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
    "eps that is no number": (
        {"rms_norm_eps": float("nan")},
        "rms_norm_eps must be a positive number, got nan",
    ),
    "endless eps": ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, got inf"),
    "no for a switch": ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_config(message, model, case):
    changes, wanted = CONFIGS[case]
    change_config(model, **changes)
    said = message(model)
    assert str(model) in said and wanted in said, said


@pytest.mark.parametrize("value", [None, "x", -1, 0, 0.5, True, [], {}, 2**70], ids=repr)
def test_no_config_field_is_believed(message, model, value):
    """Each size in turn is something else; the message names the field, or a tensor that it contradicts."""
    config = json.loads((model / "config.json").read_text())
    numbers = [
        name for name, number in config.items() if name.endswith(("_size", "_dim", "_heads", "_layers"))
    ]
    assert len(numbers) == 7
    for name in set(numbers) - ({"head_dim"} if value is None else set()):  # null is as good as absent there
        if name == "num_hidden_layers" and value == 2**70:
            continue
        change_config(model, **(config | {name: value}))
        said = message(model)
        assert name in said or "where the config says" in said or "cannot share" in said, said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b'{"model_type": "llama"', "config.json is not JSON: "),
        (b"", "config.json is not JSON: "),
        (b"\xff\xfe{}", "config.json is not JSON: "),
        (b'["llama"]', "config.json holds a list, not an object of fields"),
        (b"{}", "model_type None is not known"),
        (None, "config.json is missing; a model directory holds config.json and *.safetensors"),
    ],
)
def test_broken_config(message, model, text, wanted):
    if text is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_bytes(text)
    assert wanted in message(model)


def test_missing_weights(message, model):
    (model / "model.safetensors").unlink()
    assert message(model) == f"{model} holds neither model.safetensors nor model.safetensors.index.json"
    assert message(model / "nowhere").startswith(f"there is no directory '{model}/nowhere'; a model is a dir")


def shard(model: Path) -> dict[str, str]:
    """Splits the weights over two files; returns the index's map."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"{'a' if i < 20 else 'b'}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, model / file)
    return weight_map


def repeat_a_tensor(model: Path) -> None:
    first = next(iter(load_file(model / "a.safetensors").items()))
    save_file(load_file(model / "b.safetensors") | dict([first]), model / "b.safetensors")


INDEXES = {
    "missing shard": (
        lambda m, model: (model / "b.safetensors").unlink(),
        "b.safetensors is missing, and model",
    ),
    "cut shard": (lambda m, model: (model / "b.safetensors").write_bytes(b"123"), "cut short (3 bytes)"),
    "outside": (
        lambda m, model: m.update({Q_PROJ: "../b.safetensors"}),
        "'../b.safetensors', which is no file of",
    ),
    "absolute": (
        lambda m, model: m.update({Q_PROJ: "/b.safetensors"}),
        "'/b.safetensors', which is no file of",
    ),
    "not a name": (lambda m, model: m.update({Q_PROJ: 3}), "names 3, which is no file of"),
    "a list of names": (lambda m, model: m.update({Q_PROJ: ["b"]}), "names ['b'], which is no file of"),
    "the directory": (lambda m, model: m.update({Q_PROJ: "."}), "names '.', which is no file of"),
    "its parent": (lambda m, model: m.update({Q_PROJ: ".."}), "names '..', which is no file of"),
    "tensor nowhere": (
        lambda m, model: m.update(ghost="a.safetensors"),
        "tensors that no shard holds: ghost",
    ),
    "tensor twice": (lambda m, model: repeat_a_tensor(model), "is in both a.safetensors and b.safetensors"),
    "empty": (lambda m, model: m.clear(), "has no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_wrong_index(message, model, case):
    change, wanted = INDEXES[case]
    weight_map = shard(model)
    change(weight_map, model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    said = message(model)
    assert str(model) in said and wanted in said, said


SPECS = {
    "(0,2x3,0)I,width=32,depth=4": "'depth=4' is no option of a random model; they are norm, width, heads,",
    "(0,2x3,0)I,width": "'width' is no option of a random model",
    "(0,2x3,0)I,width=wide": "width=wide is no int",
    "(0,2x3,0)I,width=32.5": "width=32.5 is no int",
    "(0,2x3,0)I,gain=much": "gain=much is no float",
    "(0,2x3,0)I,gain=nan": "gain=nan must be positive and finite",
    "(0,2x3,0)I,gain=inf": "gain=inf must be positive and finite",
    "(0,2x3,0)I,gain=0": "gain=0 must be positive",
    "(0,2x3,0)I,heads=-1": "heads=-1 must be positive",
    "(0,2x3,0)I,width=1000000000": "width=1000000000 is not from 1 to 1048576",
    "(1,1000000000x3,1)": "is 3,000,000,002 blocks one after the other",
    "(0,1x32768,0)": "of up to 32,767 layers and recurrences",
    "(0,2x3,0)I,seed=-1": "seed=-1 must be a whole number from 0 to 2**64 - 1",
    f"(0,2x3,0)I,seed={2**64}": f"seed={2**64} must be a whole number from 0",
    "(0,2x3,0)I,width=32,width=64": "width is given twice",
    "(0,2x3,0)I,norm=batch": "norm=batch is not known; choose one of pre, ouro, huginn, olmo2",
    "(0,2x3,0)I,width=30,heads=4": "width=30 is no multiple of heads=4",
    "(0,2x3,0)I,width=6,heads=2": "rotary positions need an even head width, got 3",
    "(0,0,0)": "(0,0,0) has no layers",
    "(0,0x3,0)": "a core of 0 layers cannot run 3 times",
    "(0,2x0,0)": "a core of 2 layers cannot run 0 times",
    "(0,2x3)": "is not a random model; write for example random:(0,12x32,0)I,norm=pre,width=256",
    "(0,2x3,0)J": "is not a random model; write for example",
    "(0,-2x3,0)": "is not a random model; write for example",
    "": "is not a random model; write for example",
}


@pytest.mark.parametrize("spec", SPECS)
def test_wrong_spec(message, spec):
    assert SPECS[spec] in message("random:" + spec)
