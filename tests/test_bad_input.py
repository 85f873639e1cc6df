"""What cannot be captured is refused before anything is written: exit code 2 and one message that names what
is wrong, with its value, and what would be right.

Cases run the real command line in this process, as importing torch takes seconds; a few run it as users do.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden" / "llama"
Q_PROJ, K_PROJ = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "qk")
TINY = "random:(0,2x3,0)I,width=32,heads=2"


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
    (TINY, f"--limit {10**21}", "limit must be at most 2**62, got 1000"),
    (TINY, "--recurrences 1000000000", "is 2,000,000,000 blocks one after the other; up to 65,536 can be"),
    ("random:(4,0,0),width=32", "--loop 1-2x40000", "of up to 32,767 layers and recurrences"),
    ("random:(4,0,0),width=400000", "", "GiB of weights in float32, and this machine's memory is "),
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
        "must be integers",
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
    assert said == (
        "a.txt is text and the model has no tokenizer.json beside it, nor another form of a "
        "tokenizer; give token ids instead"
    )
    (model / "tokenizer.json").write_text('{"model": ')
    assert f"the tokenizer of {model} cannot be used: " in message(model, data="a.txt")


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
    """Runs a capture as a user does."""
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
@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path, files, arguments, wanted):
    (tmp_path / "model").mkdir()
    np.save(tmp_path / "ids.npy", [[1, 2], [3, 256]])
    before = files(tmp_path)
    done = capture([*arguments, "--store", "run.zarr"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert wanted in done.stderr and "Traceback" not in done.stderr
    assert files(tmp_path) == before
