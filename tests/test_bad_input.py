"""What cannot be captured is refused before anything is written: exit code 2 and one message that names what
is wrong, with its value, and what would be right.

Cases run the real command line in this process, as importing torch takes seconds; a few run it as users do.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from looptap.__main__ import main

GOLDEN = Path(__file__).parent / "golden" / "llama"
Q_PROJ, K_PROJ = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "qk")
TINY = "random:(0,2x3,0)I,width=32,heads=2"


def files(root: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a directory, so that any change shows."""
    found = ((path, path.lstat()) for path in sorted(root.rglob("*")))
    return {str(path): (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a command that must be refused; returns what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")  # no line of a message is broken

    def run(*arguments: object) -> str:
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        stdout, stderr = capsys.readouterr()
        assert ended.value.code == 2, stderr
        assert stdout == "" and "Traceback" not in stderr
        assert files(tmp_path) == before
        return stderr

    return run


@pytest.fixture
def message(refusal, tmp_path) -> Callable[..., str]:
    """Runs a capture that must be refused, into run.zarr unless told otherwise; returns the one message."""
    ids_path = tmp_path / "ids.npy"
    np.save(ids_path, np.arange(48).reshape(2, 24))

    def capture(
        model: object = TINY, *options: object, data: object = ids_path, store: object = "run.zarr"
    ) -> str:
        stderr = refusal("capture", model, "--data", data, "--store", store, *options)
        lines = stderr.splitlines()
        first = [number for number, line in enumerate(lines) if line.startswith("looptap: ")]
        assert len(first) == 1, stderr
        return "\n".join(lines[first[0] :]).removeprefix("looptap: ")

    return capture


@pytest.fixture
def model(tmp_path) -> Path:
    """A sound Llama checkpoint to damage."""
    shutil.copytree(
        GOLDEN, tmp_path / "model", ignore=shutil.ignore_patterns("inputs*", "reference*", "README*")
    )
    return tmp_path / "model"


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
        ["not known lm_head.weight"],
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
    "model_type": ({"model_type": "mamba"}, "model_type 'mamba' is not known; looptap reads llama, olmo2"),
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
    "rope scaling without factor": ({"rope_scaling": {"rope_type": "llama3"}}, "the field factor is missing"),
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
    "another family": ({"model_type": "olmo2"}, "not those of a olmo2 model with this config: missing "),
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
    assert message(model / "nowhere") == f"'{model}/nowhere' is no directory here and no random: spec"


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


OPTIONS = [
    (TINY, "--loop 0-1x2", "(0,2x3,0)I is looped already; --loop takes a feedforward model"),
    ("random:(4,0,0),width=32", "--loop 1-4x2", "layers 1-4 are not in this model, which has 0 to 3"),
    ("random:(4,0,0),width=32", "--loop 2-1x2", "layers 2-1 are not in this model, which has 0 to 3"),
    ("random:(4,0,0),width=32", "--loop 1-2x0", "recurrences must be at least 1, got 0"),
    (
        "random:(4,0,0),width=32",
        "--loop twice",
        "--loop 'twice' must read first-lastxtimes, for example 10-19x8",
    ),
    (
        "random:(4,0,0),width=32",
        "--recurrences 2",
        "has no core to repeat; give a window of its layers with --loop",
    ),
    ("random:(4,0,0),width=32", "--states core@0", "states 'core@0': (4,0,0) has no core"),
    (TINY, "--recurrences 0", "recurrences must be at least 1, got 0"),
    (TINY, "--limit 0", "limit must be at least 1, got 0"),
    (TINY, "--unit-tokens -5", "unit_tokens must be at least 1, got -5"),
    (TINY, "--batch-tokens 0", "batch_tokens must be at least 1, got 0"),
    (TINY, "--sink-tokens 0", "sink_tokens must be at least 1, got 0"),
    (TINY, "--seed -1", "seed must be from 0 to 2**63 - 1, got -1"),
    (TINY, f"--seed {2**63}", f"got {2**63}"),
    (TINY, "--gap-memory-gib -1", "gap_memory_gib must be a number from 0, got -1"),
    (TINY, "--gap-memory-gib nan", "gap_memory_gib must be a number from 0, got nan"),
    (TINY, "--gap-memory-gib inf", "gap_memory_gib must be a number from 0, got inf"),
    (
        TINY,
        "--unit-tokens 23",
        "row 0 has 24 tokens and a unit of 23 slots holds whole sequences only; give --unit-tokens 24",
    ),
    (TINY, "--quantities residual entropie", "'entropie' is not a quantity: choose from residual_norm, "),
    (TINY, "--quantities state", "the quantity state needs --states, for example --states core[all]@last"),
    (TINY, "--states everything", "states 'everything': write all or STAGE[LAYERS]@RECURRENCES"),
    (TINY, "--states prelude", "states 'prelude': (0,2x3,0)I has no prelude"),
    (TINY, "--states core[2]", "2 is not among the layers of the core, which are 0 to 1"),
    (TINY, "--states core@0,3", "3 is not among the recurrences, which are 0 to 2"),
    (TINY, "--states core[0-2]", "0-2 is not among the layers of the core"),
    (TINY, "--states core[first]", "'first' is no number, range, last or all among the layers of the core"),
    (
        "random:(1,2x3,0),width=32",
        "--states prelude@0",
        "only the core has recurrences, the prelude runs once",
    ),
    (TINY, "--tokens some", "tokens 'some': choose all, last, every:NUMBER or sample:SHARE"),
    (TINY, "--tokens every:0", "tokens 'every:0': choose all"),
    (TINY, "--tokens every:²", "tokens 'every:²': choose all"),
    (TINY, "--tokens sample:1.5", "tokens 'sample:1.5': choose all"),
    (TINY, "--tokens sample:nan", "tokens 'sample:nan': choose all"),
    (TINY, "--device gpu", "device 'gpu' is not known; use cpu, cuda or cuda:NUMBER"),
    (TINY, "--device meta", "device 'meta' is not known; use cpu, cuda or cuda:NUMBER"),
    (TINY, "--device cuda:99", "device cuda:99 is not there; torch sees "),
]


@pytest.mark.parametrize(("model_spec", "options", "wanted"), OPTIONS, ids=[row[1] for row in OPTIONS])
def test_wrong_option(message, model_spec, options, wanted):
    said = message(model_spec, *options.split())
    assert wanted in said, said


def test_no_gpu(message):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message(TINY, "--device", "cuda") == "device cuda is not there; torch sees 0 GPUs"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("", "capture"),
        ("catch", "catch"),
        ("capture", "MODEL"),
        (f"capture {TINY} --store run.zarr", "--data"),
        (f"capture {TINY} --data ids.npy", "--store"),
        (f"capture {TINY} --data ids.npy --store run.zarr --quantity all", "--quantity"),
        (f"capture {TINY} --data ids.npy --store run.zarr --seed one", "one"),
        (f"capture {TINY} --data ids.npy --store run.zarr --dtype int8", "float32"),
        ("status", "STORE"),
        ("report", "name at least one to report on"),
    ],
)
def test_wrong_command_line(refusal, arguments, wanted):
    assert wanted in refusal(*arguments.split())


@pytest.mark.parametrize("command", ["status", "verify", "info", "report", "analyze"])
def test_no_store(refusal, tmp_path, command):
    (tmp_path / "notes").write_text("mine")
    zarr.create_group(tmp_path / "other.zarr")
    options = ["--out", "results"] if command == "analyze" else []
    for path in ("nowhere", "notes", "other.zarr"):
        said = refusal(command, path, *options)
        assert said.startswith("looptap: ") and path in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("model_spec", "options", "wanted"),
    [
        (TINY, ["--prompt", ""], "the prompt is empty; give some text with --prompt"),
        (
            TINY + ",positions=4",
            ["--prompt", "12345"],
            "has 5 tokens and the model takes at most 4",
        ),
        (
            TINY,
            ["--prompt", "a" * 300, "--map-memory-gib", "0.001"],
            "149 tokens fit; shorten the prompt or raise --map-memory-gib",
        ),
        (str(GOLDEN), ["--prompt", "abc"], "has no tokenizer.json, so it cannot read a prompt"),
        (TINY, ["--prompt", "abc", "--seed", "-1"], "seed must be from 0 to 2**63 - 1, got -1"),
        (TINY, ["--prompt", "abc", "--recurrences", "0"], "recurrences must be at least 1, got 0"),
    ],
)
def test_wrong_prompt(refusal, model_spec, options, wanted):
    said = refusal("inspect", model_spec, *options)
    assert said.startswith("looptap: ") and wanted in said and said.count("\n") == 1, said


def npy(values: object, **how: object) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.array(values, **how), allow_pickle=True)


def safetensors(**tensors: object) -> Callable[[Path], object]:
    return lambda path: save_file({name: torch.as_tensor(value) for name, value in tensors.items()}, path)


NO_FILE = "data is a .jsonl, .txt, .npy or .safetensors file"
NO_FIELD = "row 1: no text field 'text'; it holds"
ROWS = [[1, 2, 3], [4, 5, 6]]
# name and content of a file, what is said
DATA: dict[str, tuple[str, bytes | Callable[[Path], object], str]] = {
    "empty": ("a.jsonl", b"", "holds no tokens in its 0 rows"),
    "blank lines": ("a.txt", b"\n\r\n\n", "holds no tokens in its 3 rows"),
    "blank texts": ("a.jsonl", b'{"text": ""}\n\n', "holds no tokens in its 2 rows"),
    "no field": ("a.jsonl", b'{"text": "a"}\n{"q": "b"}', f"{NO_FIELD} 'q'. Choose with --field"),
    "number as text": ("a.jsonl", b'\n{"text": 5}', f"{NO_FIELD} 'text'"),
    "no object": ("a.jsonl", b'\n["a"]\n', f"{NO_FIELD} list"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "row 1: not JSON ("),
    "half a character": ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "row 1: bytes cannot read it"),
    "not UTF-8": ("a.txt", b"caf\xe9", "is not UTF-8 text"),
    "not UTF-8 JSON": ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 text"),
    "other suffix": ("a.csv", b"a,b\n", ".csv is not read; .jsonl, .txt, .npy and .safetensors are"),
    "no suffix": ("data", b"a\n", "no suffix is not read"),
    "missing": ("a.jsonl", lambda path: None, NO_FILE),
    "a directory": ("a.jsonl", Path.mkdir, NO_FILE),
    "floats": ("a.npy", npy(ROWS, dtype=float), "integers [S, T], got float64 [2, 3]"),
    "yes and no": ("a.npy", npy([[True, False]]), "integers [S, T], got bool [1, 2]"),
    "one axis": ("a.npy", npy([1, 2, 3]), "integers [S, T], got int64 [3]"),
    "three axes": ("a.npy", npy([ROWS]), "integers [S, T], got int64 [1, 2, 3]"),
    "no rows": ("a.npy", npy(np.zeros((0, 3), int)), "holds no tokens in its 0 rows"),
    "pickle": ("a.npy", npy([[1], [2, 3]], dtype=object), "is no .npy array of numbers"),
    "cut npy": ("a.npy", b"\x93NUMPY\x01\x00", "is no .npy array of numbers"),
    "broken zip": ("a.npy", b"PK\x03\x04and so on", "is no .npy array of numbers"),
    "npz": ("a.npz", lambda path: np.savez(path, ROWS), ".npz is not read"),
    "npz as npy": (
        "a.npy",
        lambda path: np.savez(path.open("wb"), ROWS),
        "is an archive; a single .npy array of token ids [S, T] is wanted",
    ),
    "no input_ids": ("a.safetensors", safetensors(ids=ROWS), "has no tensor input_ids; it holds ids"),
    "cut safetensors": ("a.safetensors", b"\x10\x00", "is damaged or no safetensors file"),
    "float tensor": ("a.safetensors", safetensors(input_ids=[[0.5]]), "integers [S, T], got float32 [1, 1]"),
    "bfloat16 tensor": (
        "a.safetensors",
        safetensors(input_ids=torch.zeros(1, 3).bfloat16()),
        "input_ids and lengths must be whole numbers; ",
    ),
    **{
        f"lengths {lengths}": (
            "a.safetensors",
            safetensors(input_ids=ROWS, lengths=lengths),
            "lengths must be 2 whole numbers from 0 to 3",
        )
        for lengths in ([3], [1, 4], [-1, 2], [1.0, 2.0], [[1, 2]])
    },
    "id too high": (
        "a.npy",
        npy([[1], [256]]),
        "row 1 holds the token id 256; this model's vocabulary is 0 to 255",
    ),
    "id far too high": ("a.npy", npy([[1], [2**40]]), f"row 1 holds the token id {2**40}; ids are 0 to"),
    "negative id": ("a.npy", npy([[1], [-7]]), "row 1 holds the token id -7; ids are 0 to"),
    "unsigned id": ("a.npy", npy([[2**64 - 1]], dtype=np.uint64), f"row 0 holds the token id {2**64 - 1}"),
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_data(message, tmp_path, case):
    name, content, wanted = DATA[case]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    said = message(data=path)
    assert wanted in said, said
    assert name in said or "token id" in said, said


def test_the_first_rows_decide(message, tmp_path):
    """Two blank rows are all that --limit lets through."""
    (tmp_path / "a.txt").write_text("\n\nthree\n")
    said = message(TINY, "--limit", 2, data="a.txt")
    assert said == "a.txt holds no tokens in its 2 rows (limit 2)"


def test_a_sequence_longer_than_the_model(message):
    said = message(TINY + ",positions=23")
    assert said == "row 0 has 24 tokens and the model takes at most 23; shorten it or leave it out"


def test_text_for_a_model_without_tokenizer(message, model, tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    said = message(model, data="a.txt")
    assert said == ("a.txt is text and the model has no tokenizer.json beside it; give token ids instead")
    (model / "tokenizer.json").write_text('{"model": ')
    assert f"{model}/tokenizer.json is no tokenizer that the tokenizers library reads" in message(
        model, data="a.txt"
    )


def test_a_tokenizer_that_knows_too_few_words(message, model, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    (tmp_path / "a.txt").write_text("known\nunknown\n")
    Tokenizer(WordLevel({"known": 0}, unk_token="<unk>")).save(str(model / "tokenizer.json"))
    said = message(model, data="a.txt")
    assert said.startswith("a.txt, row 1: ") and "unk" in said.lower(), said


def test_a_store_path_that_holds_something_else(message, tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    zarr.create_group(tmp_path / "other.zarr")
    assert "notes is a file, not a store: choose another path" in message(store="notes")
    assert "full is not a looptap store, it holds thesis.tex: choose another path" in message(store="full")
    assert "other.zarr is not a looptap store, it holds zarr.json" in message(store="other.zarr")
    assert "gone" in message(store="gone")
    assert "notes" in message(store="notes/run.zarr")


def capture(arguments: list[object], cwd: Path) -> subprocess.CompletedProcess:
    """As a user runs it."""
    command = [sys.executable, "-m", "looptap", "capture", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A finished capture of the same ids that `message` captures."""
    path = tmp_path_factory.mktemp("store")
    np.save(path / "ids.npy", np.arange(48).reshape(2, 24))
    done = capture([TINY, "--data", "ids.npy", "--store", "run.zarr"], path)
    assert done.returncode == 0, done.stderr
    return path / "run.zarr"


@pytest.mark.parametrize(
    ("model_spec", "options", "differs"),
    [
        (TINY, "--seed 5", "settings.seed: 0 -> 5"),
        (TINY, "--limit 1", "num_tokens: 48 -> 24"),
        (TINY, "--recurrences 4", "model.recurrences: 3 -> 4"),
        (TINY, "--unit-tokens 64", "settings.unit_tokens: 4096 -> 64"),
        (TINY + ",seed=1", "", "model.weights_sha256: "),
        (TINY + ",norm=ouro", "", "model.norm: pre -> ouro"),
        (TINY, "--quantities steps", "settings.quantities: ['residual_norm', "),
    ],
)
def test_another_plan_at_the_same_path(message, store, tmp_path, model_spec, options, differs):
    shutil.copytree(store, tmp_path / "run.zarr")
    said = message(model_spec, *options.split())
    assert said.startswith("run.zarr was begun with another plan; it differs in\n")
    assert said.endswith("go on with the old settings, or choose another --store")
    assert differs in said, said


def test_other_data_at_the_same_path(message, store, tmp_path):
    shutil.copytree(store, tmp_path / "run.zarr")
    np.save(tmp_path / "other.npy", np.arange(48).reshape(2, 24)[::-1])
    said = message(data="other.npy")
    assert "data.name: ids.npy -> other.npy" in said and "data.sha256: " in said


def test_a_disk_that_is_too_small(message, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    said = message(TINY, "--states", "all", "--unit-tokens", 4096)
    # 4096 slots of 6 depths: 7 statistics, 4 more by 2 heads, and states of width 32, float32
    needed = 4096 * 6 * (7 + 4 * 2 + 32) * 4 / 2**20
    assert said == (
        f"run.zarr needs up to {needed:.1f} MiB and its disk has 1.0 MiB free; "
        "choose fewer quantities, states or rows, or another disk"
    )


def test_more_slots_than_any_disk_has(message):
    """10**18 slots: their bytes do not fit 64 bits."""
    assert "run.zarr needs up to " in message(TINY, "--unit-tokens", 10**18)


MOUNTED = 'mount -t tmpfs -o size=1m none "$1" && shift && "$@"; code=$?; ls -A "$PWD/disk"; exit $code'


def test_a_disk_that_really_is_too_small(tmp_path):
    """1 MB, in a mount namespace of its own; half of that is enough for the plan, and none of it is used."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("this machine does not let users mount a tmpfs")
    (tmp_path / "disk").mkdir()
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    command = [
        sys.executable,
        "-m",
        "looptap",
        "capture",
        TINY,
        "--data",
        "ids.npy",
        "--store",
        "disk/run.zarr",
    ]
    command = [*namespace, "sh", "-c", MOUNTED, "sh", str(tmp_path / "disk"), *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "disk/run.zarr needs up to 1.4 MiB and its disk has 1.0 MiB free" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["model", "--data", "ids.npy"], "looptap: model/config.json is missing"),
        ([TINY, "--data", "ids.npy"], "row 1 holds the token id 256; this model's vocabulary is 0 to 255"),
        ([TINY, "--data", "ids.npy", "--speed", "2"], "--speed"),
    ],
)
def test_as_a_user_runs_it(tmp_path, arguments, wanted):
    (tmp_path / "model").mkdir()
    np.save(tmp_path / "ids.npy", [[1, 2], [3, 256]])
    before = files(tmp_path)
    done = capture([*arguments, "--store", "run.zarr"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert wanted in done.stderr and "Traceback" not in done.stderr
    assert files(tmp_path) == before
