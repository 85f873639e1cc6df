"""A model by its Hub id is the model in the directory, fetched once, and no more of it than is needed.

Commands run as users run them, in processes of their own against a server on this machine: the Hub's library
reads its settings from the environment when it is imported. Most are forked from one that has loaded torch.
"""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import zarr
from safetensors.torch import load_file, save, save_file

from looptap.capture.models.load import find_model
from looptap.tests.hub_server import Hub, serve_hub
from looptap.tests.warm_python import WarmPython, warm_python

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "llama"
ID = "Some-Lab/tiny.llama_5"
SMALL = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    "model.safetensors.index.json",
}  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """The environment of a user with an empty cache, no login and no network but the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "COLUMNS": "1000",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    with warm_python() as python:
        yield python


@pytest.fixture
def run(python, environment, tmp_path) -> Run:
    """Runs a looptap command; further settings are environment variables."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
        return python.run([*map(str, arguments)], tmp_path, environment | variables)

    return run


@pytest.fixture
def capture(run, tmp_path) -> Run:
    """Captures two short sequences of ids with a model."""
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))

    def capture(model: str, store: str = "run.zarr", **variables: str) -> subprocess.CompletedProcess:
        return run("capture", model, "--data", "ids.npy", "--store", store, **variables)

    return capture


IDENTITIES = """
import json, sys
from looptap.capture.models.load import find_model
print(json.dumps([find_model(spec).identity() for spec in sys.argv[1:]]))
"""
MESSAGES = """
import json, sys
from looptap.capture.models.load import find_model
from looptap.errors import ModelError
said = {}
for spec in sys.argv[1:]:
    try:
        find_model(spec)
    except ModelError as error:
        said[spec] = str(error)
print(json.dumps(said))
"""


@pytest.fixture
def in_one_process(python, environment, tmp_path) -> Callable:
    """Runs code; returns the JSON that it prints."""

    def in_one_process(code: str, *arguments: str, **variables: str):
        done = python.run([*arguments], tmp_path, environment | variables, code)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return in_one_process


@pytest.fixture
def identities(in_one_process) -> Callable[..., list[dict]]:
    """What plans would say of models."""
    return partial(in_one_process, IDENTITIES)


@pytest.fixture
def messages(in_one_process) -> Callable[..., dict[str, str]]:
    """How models are refused, by spec."""
    return partial(in_one_process, MESSAGES)


def golden_files() -> dict[str, bytes]:
    return {name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors")}


def sharded_files() -> dict[str, bytes]:
    """The golden model in three shards of which the first is smaller than the others."""
    tensors = load_file(GOLDEN / "model.safetensors")
    names = sorted(tensors)
    parts = [names[:4], names[4:20], names[20:]]
    shards = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
    weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    files = {
        shard: save({name: tensors[name] for name in part}) for shard, part in zip(shards, parts, strict=True)
    }
    index = {"metadata": {}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files | {"config.json": (GOLDEN / "config.json").read_bytes()}


def tokenizer_file() -> bytes:
    """Words of one letter to ids from 7."""
    words = {letter: number for number, letter in enumerate("?abcdefgh", start=7)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


def large_files() -> dict[str, bytes]:
    """The golden model with 2**16 words: one file of 17 MiB, more than the library takes at a time."""
    tensors = load_file(GOLDEN / "model.safetensors")
    words = torch.randn(2**16, 64, generator=torch.Generator().manual_seed(0))
    config = json.loads((GOLDEN / "config.json").read_text()) | {"vocab_size": 2**16}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(tensors | {"model.embed_tokens.weight": words}),
    }


def plan_of(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"]["plan"]


def assert_same_values(a: Path, b: Path) -> None:
    first, second = zarr.open_group(a, mode="r"), zarr.open_group(b, mode="r")
    assert sorted(first) == sorted(second) and len(list(first)) > 10
    for name in first:
        np.testing.assert_array_equal(first[name][...], second[name][...], err_msg=name)


def message_of(done: subprocess.CompletedProcess) -> str:
    """What a refused command said in its one message, after what it had said before of a capture to come."""
    assert done.returncode == 2, done
    assert done.stdout == "" and "Traceback" not in done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("looptap: ") and not any("looptap: " in line for line in before), done.stderr
    return line.removeprefix("looptap: ")


@pytest.mark.parametrize("files", [golden_files, sharded_files], ids=["one file", "shards"])
def test_an_id_captures_what_the_directory_does(hub, run, tmp_path, files):
    files = files() | {"tokenizer.json": tokenizer_file()}
    (tmp_path / "directory").mkdir()
    for name, body in files.items():
        (tmp_path / "directory" / name).write_bytes(body)
    (tmp_path / "words.txt").write_text("a b c d\nh g zebra e a a\n")
    commit = hub.add(ID, files)
    for model, store in ((ID, "hub.zarr"), ("directory", "directory.zarr")):
        done = run("capture", model, "--data", "words.txt", "--store", store, "--states", "all")
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # no progress bars where there is no terminal
    assert_same_values(tmp_path / "hub.zarr", tmp_path / "directory.zarr")
    ids = zarr.open_group(tmp_path / "hub.zarr", mode="r")["token_id"][:10]
    assert ids.tolist() == [15, 14, 7, 12, 8, 8, 8, 9, 10, 11]  # by the tokenizer beside the model
    by_id, by_path = plan_of(tmp_path / "hub.zarr"), plan_of(tmp_path / "directory.zarr")
    assert (by_id["model"]["name"], by_id["model"]["spec"]) == (ID, f"{ID}@{commit}")
    assert by_path["model"]["name"] == "directory"
    for name in ("weights_sha256", "num_parameters", "notation"):
        assert by_id["model"][name] == by_path["model"][name]
    assert by_id["tokenizer"] == by_path["tokenizer"]


def test_every_fixture_is_told_apart_by_its_headers(hub, identities):
    """The wiring is read from headers before the weights have come, the hash from the weights."""
    models = sorted(path.parent for path in GOLDEN.parent.glob("*/config.json"))
    assert len(models) >= 7
    for path in models:
        names = [name for name in os.listdir(path) if name.startswith(("config", "model"))]
        hub.add(f"lab/{path.name}", {name: (path / name).read_bytes() for name in names})
    found = identities(*(f"lab/{path.name}" for path in models))
    for path, by_id in zip(models, found, strict=True):
        by_path = find_model(str(path)).identity()
        assert by_id | {"name": path.name, "spec": path.name} == json.loads(json.dumps(by_path))


def test_the_second_run_fetches_nothing(hub, capture, tmp_path):
    hub.add(ID, sharded_files())
    assert capture(ID, "first.zarr").returncode == 0
    for name, body in sharded_files().items():
        assert len(body) <= hub.num_bytes(name) <= len(body) + 100_001  # a header is read before the file
    hub.requests.clear()
    assert capture(ID, "second.zarr").returncode == 0
    (asked,) = [request for request in hub.requests if request.name]  # what main is now
    assert (asked.method, asked.name, asked.num_bytes) == ("HEAD", "config.json", 0)
    assert_same_values(tmp_path / "first.zarr", tmp_path / "second.zarr")


def test_only_what_is_needed_is_asked_for(hub, capture):
    """Among copies of the weights in other places and forms, and code that comes with models."""
    needed = sharded_files()
    others = "modeling_llama.py pytorch_model.bin model.pt consolidated.safetensors training_args.bin"
    others += " original/model.safetensors original/config.json README.md"
    hub.add(ID, needed | dict.fromkeys(others.split(), b"not to be read"))
    assert capture(ID).returncode == 0
    # without tokenizer.json there may be another form of one; and a second set of weights would be refused
    others = {"tokenizer.model", "vocab.json", "merges.txt", "model.safetensors"}
    assert hub.asked_for() == set(needed) | SMALL | others


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("model.safetensors", "holds two sets of weights"),
        ("adapter_config.json", "holds an adapter beside the weights (adapter_config.json)"),
        ("quantize_config.json", "holds quantize_config.json, so its weights are quantised"),
    ],
)
def test_files_that_make_another_model_are_refused_before_weights_are_fetched(hub, run, more, wanted):
    hub.add(ID, sharded_files() | {more: b"{}"})
    assert wanted in message_of(run("info", ID))
    assert not [request for request in hub.requests if request.name.endswith("of-3.safetensors")]


def test_a_damaged_file_is_thrown_away(hub, capture, tmp_path):
    """A wrong byte, which no length shows; the shards that came before it are kept."""
    files = sharded_files()
    hub.add(ID, files)
    hub.damaged = {"model-3-of-3.safetensors"}
    said = message_of(capture(ID))
    assert said.startswith(f"{ID}: model-3-of-3.safetensors came damaged, its SHA-256 is not ")
    assert not (tmp_path / "run.zarr").exists()
    hub.requests.clear()
    assert capture(ID).returncode == 0
    assert {request.name for request in hub.requests} & set(files) == {
        "config.json",
        "model-3-of-3.safetensors",
    }
    for name, body in sharded_files().items():
        assert [path.read_bytes() for path in (tmp_path / "home").rglob(name)] == [body]


def test_a_broken_transfer_goes_on(hub, capture, tmp_path):
    """The library writes 10 MiB at a time, and asks for what follows the last of them that is whole."""
    files = large_files()
    size, kept, cut = len(files["model.safetensors"]), 10 << 20, 13 << 20
    hub.add(ID, files)
    hub.cuts = {"model.safetensors": cut}
    done = capture(ID)
    assert done.returncode == 0, done.stderr
    sent = [(r.first_byte, r.num_bytes) for r in hub.requests if r.num_bytes > 100_001]
    assert sent == [(0, cut), (kept, size - kept)]
    (path,) = (tmp_path / "home").rglob("model.safetensors")
    assert path.read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_whole_files_alone(hub, environment, capture, tmp_path, stop):
    """Stopped at once in the second of three shards; the next run fetches that and the third."""
    files = sharded_files()
    hub.add(ID, files)
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    hub.stalls = {"model-2-of-3.safetensors": 200_000}
    command = [sys.executable, "-m", "looptap", "capture", ID, "--data", "ids.npy", "--store", "run.zarr"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "120"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert hub.stalled.wait(60)
        process.send_signal(stop)
        stderr = process.communicate(timeout=60)[1]  # half of what the library would wait for its server
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    assert "Traceback" not in stderr and not (tmp_path / "run.zarr").exists()
    hub.requests.clear()
    done = capture(ID)
    assert done.returncode == 0, done.stderr
    sent = {(request.name, request.num_bytes) for request in hub.requests}
    assert {name for name, body in files.items() if (name, len(body)) in sent} == {
        "model-2-of-3.safetensors",
        "model-3-of-3.safetensors",
    }


def test_a_token_is_sent_to_the_hub_alone(hub, run, tmp_path):
    """The token is from HF_TOKEN or a stored login; without one there is no such repository."""
    commit = hub.add(ID, golden_files())
    hub.repositories[ID].token = "secret"
    refused = message_of(run("info", ID))
    assert refused == message_of(run("info", ID, HF_TOKEN="another"))
    assert refused == (
        f"the Hub has no model {ID} that you may read, and there is no such directory here; check the name, "
        "and if it is private, log in with `hf auth login` or set HF_TOKEN"
    )
    hub.requests.clear()
    assert run("info", ID, HF_TOKEN="secret").returncode == 0
    (tmp_path / "home" / "token").write_text("secret")
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    done = run("capture", ID, "--data", "ids.npy", "--store", "run.zarr")
    assert done.returncode == 0, done.stderr
    assert plan_of(tmp_path / "run.zarr")["model"]["spec"] == f"{ID}@{commit}"
    at_storage = [request for request in hub.requests if request.path.startswith("/storage/")]
    at_hub = [request for request in hub.requests if request.name and request not in at_storage]
    assert {request.authorization for request in at_storage} == {None}
    assert {request.authorization for request in at_hub} == {"Bearer secret"}
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "{id} is gated: accept its terms at {endpoint}/{id}, then log in with `hf auth login`"),
        ("another", "{id} is gated: accept its terms at {endpoint}/{id}, then log in with `hf auth login`"),
        ("expired", "the Hub refuses the token that it was sent for {id} (401); use one that may read it"),
    ],
    ids=["no token", "not accepted", "expired"],
)
def test_a_gated_model(hub, run, token, said):
    hub.add(ID, golden_files())
    hub.repositories[ID].is_gated, hub.repositories[ID].token = True, "secret"
    assert message_of(run("info", ID, HF_TOKEN=token)).startswith(said.format(id=ID, endpoint=hub.endpoint))


def test_revisions(hub, identities, run):
    """A branch, a tag with a slash and a commit; the plan names the commit, whatever led to it."""
    other = golden_files()
    other["model.safetensors"] = other["model.safetensors"][:-4] + b"\0\0\0\0"
    first = hub.add(ID, golden_files(), "v1/old")
    second = hub.add(ID, other)
    main, named_main, tag, commit = identities(ID, f"{ID}@main", f"{ID}@v1/old", f"{ID}@{first}")
    assert main["spec"] == f"{ID}@{second}" and tag["spec"] == f"{ID}@{first}"
    assert (main, tag) == (named_main, commit)
    assert main["weights_sha256"] != tag["weights_sha256"]
    for revision in ("v2", "0" * 40):
        said = message_of(run("info", f"{ID}@{revision}"))
        assert said == f"{ID} has no branch, tag or commit {revision}; see {hub.endpoint}/{ID}/commits"


def test_a_store_keeps_to_its_commit(hub, run, tmp_path):
    """The branch moves on while a capture is half done."""
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    first = hub.add(ID, golden_files())
    options = ("--data", "ids.npy", "--store", "run.zarr")
    assert run("capture", ID, *options).returncode == 0
    with_readme = golden_files() | {"README.md": b"nothing but this has changed"}
    second = hub.add(ID, with_readme)
    done = run("capture", ID, *options)
    assert done.returncode == 2
    assert f"model.spec: {ID}@{first} -> {ID}@{second}" in done.stderr
    assert run("capture", f"{ID}@{first}", *options).returncode == 0


def test_without_a_network_the_cache_is_used(hub, capture, identities, tmp_path):
    """Set offline, and with a Hub that is down; a branch is the commit that it was when it was last seen."""
    commit = hub.add(ID, sharded_files())
    assert capture(ID).returncode == 0
    hub.add(ID, golden_files())
    hub.requests.clear()
    done = capture(ID, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "1 of 1 units are in run.zarr, 1 of them before" in done.stderr
    seen = plan_of(tmp_path / "run.zarr")["model"]
    assert seen["spec"] == f"{ID}@{commit}"
    assert identities(ID, f"{ID}@{commit}", HF_HUB_OFFLINE="1") == [seen, seen]
    assert hub.requests == []
    hub.is_down = True
    assert identities(ID) == [seen]


def test_offline_without_the_files(hub, run, tmp_path):
    """Nothing is in the cache, or the weights are not."""
    wanted = (
        f"HF_HUB_OFFLINE is set and the cache, {tmp_path}/home/hub, lacks files of {ID}; run the command "
        "once without it, or copy the cache of a machine that has them"
    )
    hub.add(ID, golden_files())
    assert message_of(run("info", ID, HF_HUB_OFFLINE="1")) == wanted
    assert hub.requests == []
    assert run("info", ID).returncode == 0
    assert message_of(run("info", ID, HF_HUB_OFFLINE="1")) == wanted


# the library waits for 23 s between its tries
WITHOUT_WAITING = """
import sys, time
time.sleep = lambda seconds: None
from looptap.cli.entry import main
main()
"""


def test_a_hub_that_does_not_answer(hub, python, environment, tmp_path):
    """The library tries several times, and says so; then there is one message."""
    hub.is_down = True
    for endpoint, reason in (
        (hub.endpoint, "503 Service Unavailable"),
        ("http://127.0.0.1:9", "refused"),  # nobody listens there
    ):
        done = python.run(["info", ID], tmp_path, environment | {"HF_ENDPOINT": endpoint}, WITHOUT_WAITING)
        text = message_of(done)
        assert text.startswith(f"{endpoint} could not be asked for {ID} (") and reason in text
        assert text.endswith("lacks files of it; check the network and run the command again")


NO_MODELS = {
    "only a pickle": (
        {"pytorch_model.bin": b"", "modeling.py": b""},
        "holds its weights only as pickles (pytorch_model.bin), which can run code when opened",
    ),
    "no weights": (
        {"flax_model.msgpack": b"", "sub/model.safetensors": b""},
        "holds neither model.safetensors nor model.safetensors.index.json; its files are config.json, "
        "flax_model.msgpack",
    ),
    "no config": (
        {"config.json": None, "model.safetensors": b""},
        "holds no config.json, so it is no model that looptap reads; a model is a directory",
    ),
    "an index of pickles": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "pytorch_model.bin"}}'},
        "its model.safetensors.index.json names 'pytorch_model.bin', which is no safetensors file beside it",
    ),
    "an index of other places": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "../model.safetensors"}}'},
        "its model.safetensors.index.json names '../model.safetensors', which is no safetensors file beside",
    ),
    "an index of nothing": (
        {"model.safetensors.index.json": b"[]"},
        "its model.safetensors.index.json has no weight_map of tensors to files",
    ),
    "a missing shard": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
        "lacks model-1.safetensors, which its model.safetensors.index.json names",
    ),
    "no safetensors inside": (
        {"model.safetensors": b"<!doctype html>"},
        "has weights that are not what their names say (SafetensorsParsingError: ",
    ),
}


def test_repositories_that_are_no_models(hub, messages):
    config = golden_files()["config.json"]
    names = {f"lab/{number}": case for number, case in enumerate(NO_MODELS)}
    for id, case in names.items():
        files = {"config.json": config, **NO_MODELS[case][0]}
        hub.add(id, {name: body for name, body in files.items() if body is not None})
    for id, said in messages(*names).items():
        assert said.startswith(id) and NO_MODELS[names[id]][1] in said, said
    assert not [name for name in hub.asked_for() if name.endswith((".bin", ".py", ".msgpack"))]


FORMS = "; a model is a directory with config.json and *.safetensors, a Hub id ORG/NAME or ORG/NAME@REVISION "
FORMS += "(branch, tag or commit), or a random: spec"
NO_IDS = {
    **{
        path: f"there is no directory '{path}'{FORMS}"
        for path in (
            "./lab/model",
            "../model",
            "/lab/model",
            "~/model",
            "a/b/c",
            "lab/model/",
            "a/b/c@d",
        )
    },
    **{
        name: f"'{name}' is no directory here, and a Hub id has an ORG/ before its NAME{FORMS}"
        for name in ("gpt2", "gpt2@main", "@main")
    },
    **{
        spec: f"'{spec.partition('@')[0]}' is no Hub id, which reads ORG/NAME in letters, digits, - _ and ."
        + FORMS
        for spec in (
            "lab/mo del",
            "la..b/model",
            "lab/a--b",
            "-lab/model",
            "lab/model:1",
            "lab/mödel@v1",
        )
    },
    **{
        f"lab/model@{revision}": f"'lab/model@{revision}' asks for revision '{revision}', which no branch, "
        "tag or commit is called"
        for revision in ("", "a..b", "../../x", "a b", "-x", "/x", "v1@v2")
    },
    "lab/file": f"'lab/file' is a file{FORMS}",
}


def test_what_is_no_id_is_not_looked_up(hub, messages, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "file").touch()
    assert messages(*NO_IDS) == NO_IDS
    assert hub.requests == []


def test_a_directory_goes_before_the_hub(hub, run, tmp_path):
    hub.add("lab/model", golden_files())
    (tmp_path / "lab" / "model").mkdir(parents=True)
    for name, body in golden_files().items():
        (tmp_path / "lab" / "model" / name).write_bytes(body)
    assert run("info", "lab/model").returncode == 0
    assert hub.requests == []


def test_info_reads_headers_alone(hub, run, tmp_path):
    """No more of 17 MiB of weights is read than the library asks for at once."""
    files = large_files()
    commit = hub.add(ID, files)
    (tmp_path / "directory").mkdir()
    for name, body in files.items():
        (tmp_path / "directory" / name).write_bytes(body)
    by_id, by_path = run("info", ID), run("info", "directory")
    assert by_id.returncode == 0, by_id.stderr
    assert by_id.stdout.splitlines()[1:] == by_path.stdout.splitlines()[1:]
    assert by_id.stdout.split()[:2] == ["model", f"{ID}@{commit[:8]}"]
    assert hub.num_bytes("model.safetensors") == 100_001
    assert list((tmp_path / "home").rglob("model.safetensors")) == []


def test_a_model_of_another_kind_is_refused_before_its_weights(hub, capture, tmp_path):
    files = large_files()
    save_file({"extra": torch.zeros(5_000_000)}, tmp_path / "model.safetensors")
    hub.add(ID, files | {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    said = message_of(capture(ID))
    assert said.startswith(
        f"{ID}: its tensors are not those of a llama model with this config: missing model."
    )
    assert "not known extra" in said
    assert hub.num_bytes("model.safetensors") == 100_001


SMALL_DISK = 'mount -t tmpfs -o size=8m none "$1" && shift && exec "$@"'
FETCH = """
import sys
from looptap.capture.models.hub import fetch_model, fetch_weights
try:
    fetch_weights(fetch_model(sys.argv[1]), 0)  # as if the disk had filled up since it was looked at
except ValueError as error:
    sys.exit(f"looptap: {error}")
"""


def test_a_disk_that_is_too_small(hub, environment, tmp_path):
    """8 MiB for a file of 17, seen before it is fetched, and while it is."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("this machine does not let users mount a tmpfs")
    files = large_files()
    hub.add(ID, files)
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    (tmp_path / "home").mkdir()
    mounted = [*namespace, "sh", "-c", SMALL_DISK, "sh", str(tmp_path / "home"), sys.executable]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*mounted, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = run("-m", "looptap", "capture", ID, "--data", "ids.npy", "--store", "run.zarr")
    mebibytes = 16 + (237_248 - 256 * 64) * 4 / 2**20
    said = message_of(done)
    assert said.startswith(
        f"{ID} takes {mebibytes:.1f} MiB more in {tmp_path}/home/hub, and its disk has 8.0 MiB"
    )
    assert said.endswith("free; free some, or let HF_HOME name a directory on a larger disk")
    assert hub.num_bytes("model.safetensors") == 100_001
    done = run("-c", FETCH, ID)
    assert (
        f"looptap: the disk of {tmp_path}/home/hub filled up while {ID} was fetched; free some" in done.stderr
    )
    assert "Traceback" not in done.stderr and done.returncode == 1


def test_a_terminal_shows_the_progress(hub, environment, tmp_path):
    hub.add(ID, large_files())
    np.save(tmp_path / "ids.npy", np.arange(48).reshape(2, 24))
    command = [sys.executable, "-m", "looptap", "capture", ID, "--data", "ids.npy", "--store", "run.zarr"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while chunk := read_terminal(ours):
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    assert b"model.safetensors: 100%|" in shown


def read_terminal(descriptor: int) -> bytes:
    """The next piece; empty when the other side is closed, which Linux reports as an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""
