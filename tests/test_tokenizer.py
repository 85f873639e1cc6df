"""Which ids a text has follows from all files of a directory, as transformers' AutoTokenizer reads them."""

import hashlib
import json
import random
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import looptap
from looptap.capture.data import make_dataset
from looptap.capture.models.other_files import tokenizer_files
from looptap.capture.tokenizer import BYTES, model_tokenizer, open_tokenizer
from looptap.errors import DataError, OtherPlanError, UserError
from looptap.tests.golden_files import copy_model

TEXTS = ("two trains leave", " <s> two", "late</s>late <extra> <s>", "Ünïcode 数学 \t x", "<s>two trains", "")


def base(kind: str) -> Tokenizer:
    """A small trained tokenizer: as GPT-2's and Llama 3's are made, or as Llama 2's."""
    if kind == "byte level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder, alphabet = decoders.Metaspace(), []
    lines = ["two trains leave the station at noon and one of them is late"] * 3
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def beginning_with(tokenizer: Tokenizer, form: str) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    return tokenizer


def widen(tensors: dict[str, torch.Tensor]) -> None:
    """Gives the model as many embeddings again, for ids of the tokenizers here."""
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"]] * 2)


def write(folder, kind="byte level", form=None, config=None, change=lambda tokenizer: None, **files):
    """A model's directory with a tokenizer; returns the tokenizer's files."""
    if not folder.exists():
        copy_model("llama", folder, widen, vocab_size=512)
    tokenizer = base(kind) if form is None else beginning_with(base(kind), form)
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        files["tokenizer_config"] = config
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return tokenizer_files(folder)


def drawn(chance: random.Random) -> dict:
    """How a directory may be, as they are met and as they are broken."""

    def change(tokenizer: Tokenizer) -> None:
        if chance.random() < 0.2:
            tokenizer.normalizer = chance.choice([normalizers.Lowercase(), normalizers.NFKC()])
        if chance.random() < 0.2:
            tokenizer.enable_truncation(3)
        if chance.random() < 0.2:
            tokenizer.add_special_tokens([AddedToken("<extra>", lstrip=chance.random() < 0.5)])

    classes = ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer",
               "Qwen2Tokenizer", "TokenizersBackend", None]  # fmt: skip
    fields = {
        "tokenizer_class": classes, "add_bos_token": [True, False], "add_eos_token": [True, False],
        "bos_token": ["<s>", None, "<begin>", {"content": "<s>", "__type": "AddedToken"}],
        "eos_token": ["</s>", "<end>"],
        "unk_token": ["<unk>"], "pad_token": ["<pad>"], "add_prefix_space": [True, False],
        "legacy": [True, False],
        "split_special_tokens": [True], "do_lower_case": [True], "model_max_length": [2],
        "padding_side": ["left"],
        "added_tokens_decoder": [
            {"300": {"content": "<extra>", "special": True}}, {"1": {"content": "<s>", "special": True}},
        ],
        "additional_special_tokens": [["<extra>"]], "extra_special_tokens": [{"image_token": "<extra>"}],
        "clean_up_tokenization_spaces": [True], "auto_map": [{"AutoTokenizer": ["x.Slow", None]}],
    }  # fmt: skip
    config = {
        name: chance.choice(values) for name, values in fields.items() if chance.random() < 0.3
    } if chance.random() < 0.9 else None  # fmt: skip
    files = {}
    if chance.random() < 0.3:
        files["special_tokens_map"] = chance.choice(
            [{"bos_token": "<s>"}, {"bos_token": "<begin>"}, {"additional_special_tokens": ["<extra>"]}]
        )
    if chance.random() < 0.3:
        files["added_tokens"] = {"<extra>": 300}
    form = chance.choice([None, "<s> $A", "<s> $A </s>", "$A </s>", "<s>:0 $A:0"])
    return {
        "kind": chance.choice(["byte level", "metaspace"]),
        "form": form,
        "config": config,
        "change": change,
        **files,
    }


def check_variants(tmp_path, numbers) -> tuple[int, int]:
    """Compares ids with AutoTokenizer's; returns how many directories were read and how many refused."""
    from transformers import AutoTokenizer

    num_read = num_refused = 0
    for number in numbers:
        how = drawn(random.Random(number))
        files = write(tmp_path / str(number), **how)
        ours = open_tokenizer(files)
        try:
            found = [ours.encode(text) for text in TEXTS if not text.startswith("<s>")]
        except DataError:
            num_refused += 1
            continue
        theirs = AutoTokenizer.from_pretrained(files[0].parent, trust_remote_code=False)
        wanted = [theirs(text).input_ids for text in TEXTS if not text.startswith("<s>")]
        assert found == wanted, (number, how)
        num_read += 1
    return num_read, num_refused


@pytest.mark.slow
def test_ids_are_those_of_transformers_or_refused(tmp_path):
    num_read, num_refused = check_variants(tmp_path, range(60))
    assert num_read > 15 and num_refused > 5


@pytest.mark.full
def test_ids_are_those_of_transformers_for_long(tmp_path):
    num_read, num_refused = check_variants(tmp_path, range(100, 400))
    assert num_read > 80 and num_refused > 25


@pytest.mark.parametrize(
    ("form", "config", "said"),
    [
        (None, {"add_bos_token": True, "bos_token": "<s>"}, "add_bos_token true"),
        ("<s> $A", {"add_bos_token": False, "bos_token": "<s>"}, "add_bos_token false"),
        ("$A", {"add_eos_token": True, "eos_token": "</s>"}, "add_eos_token true"),
    ],
)
def test_a_config_that_says_other_than_what_comes_out_is_asked_about(tmp_path, form, config, said):
    files = write(tmp_path / "m", form=form, config=config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    bare = base("byte level").encode("two").ids
    try:  # some versions do what the file says
        ids = open_tokenizer(files).encode("two")
        assert (ids[0] == 1) == config.get("add_bos_token", False) and (ids[-1] == 2) == config.get(
            "add_eos_token", False
        )
    except DataError as error:
        assert f"tokenizer_config.json says {said}" in str(error) and "--special-tokens bos" in str(error)
    assert open_tokenizer(files, "none").encode("two") == bare
    if "bos_token" in config:
        assert open_tokenizer(files, "bos").encode("two") == [1, *bare]


def test_one_beginning_and_no_more(tmp_path):
    files = write(tmp_path / "m", form="<s> $A", config={"bos_token": "<s>"})
    tokenizer = open_tokenizer(files)
    with pytest.raises(DataError, match="it begins with <s> and the tokenizer puts another one before it"):
        tokenizer.encode("<s>two")
    with pytest.raises(DataError, match=r"texts.jsonl, row 1: it begins with <s>"):
        make_dataset(["two", "<s>two"], tokenizer)
    bare = base("byte level").encode("two").ids
    for choice in ("none", "bos"):
        assert open_tokenizer(files, choice).encode("<s>two") == [1, *bare]
    assert tokenizer.encode("two<s>") == [1, *bare, 1]


def test_no_beginning_token(tmp_path):
    with pytest.raises(DataError, match="names no bos_token"):
        open_tokenizer(write(tmp_path / "m", config={"tokenizer_class": "TokenizersBackend"}), "bos").encode(
            "two"
        )


def test_the_plan_says_how_rows_begin(tmp_path):
    folder = tmp_path / "m"
    write(folder, form="<s> $A", config={"bos_token": "<s>"})
    plan = looptap.capture(folder, ["", "two trains"]).attrs["plan"]["tokenizer"]
    bare = base("byte level")
    ids = bare.encode("two trains").ids[:3]
    assert plan["beginning"] == [[1, "<s>"], *([id, bare.decode([id])] for id in ids)][:4]
    assert "special_tokens" not in plan and plan["name"] == "tokenizer.json"
    plan = looptap.capture(folder, ["two"], special_tokens="none").attrs["plan"]["tokenizer"]
    assert plan["special_tokens"] == "none" and plan["beginning"][0][0] != 1
    plan = looptap.capture(folder, [[5, 6]]).attrs["plan"]["tokenizer"]
    assert "beginning" not in plan


def test_the_hash_is_of_all_files(tmp_path):
    files = write(tmp_path / "m")
    alone = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert len(files) == 1 and open_tokenizer(files).sha256 == alone
    hashes = {alone}
    for config in ({"bos_token": "<s>"}, {"bos_token": "</s>"}):
        hashes.add(open_tokenizer(write(tmp_path / "m", config=config)).sha256)
    hashes.add(open_tokenizer(write(tmp_path / "m", added_tokens={"<x>": 300})).sha256)
    assert len(hashes) == 4


def test_special_tokens_are_of_text(tmp_path):
    write(tmp_path / "m", config={"bos_token": "<s>"})
    with pytest.raises(UserError, match="the data are token ids, and no text"):
        looptap.capture(tmp_path / "m", [[1, 2]], special_tokens="none")
    with pytest.raises(UserError, match="bytes, which have no beginning token"):
        looptap.capture("random:(0,1x2,0)I,width=16,heads=2", ["a"], special_tokens="bos")


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"version": "1.0"}', "{" * 10_000, "\x00" * 99])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    files = write(tmp_path / "m")
    files[0].write_text(content)
    with pytest.raises(DataError, match="cannot be used"):
        open_tokenizer(files).encode("two")


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{" * 10_000, '{"add_bos_token": {}}', '{"bos_token": 3}']
)
def test_a_config_of_any_kind_ends_in_one_message_or_none(tmp_path, content):
    files = write(tmp_path / "m", config={})
    files[1].write_text(content)
    try:
        open_tokenizer(files).encode("two")
    except DataError as error:
        assert str(tmp_path) in str(error)


def test_code_of_the_directory_is_not_run(tmp_path):
    config = {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, "tokenizer_class": "Evil"}
    files = write(tmp_path / "m", config=config)
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with suppress(DataError):
        open_tokenizer(files).encode("two")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_token_ids_load_no_tokenizer(tmp_path):
    write(tmp_path / "m")
    script = (
        "import sys, looptap; looptap.capture(sys.argv[1], [[1, 2]]); print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_store_is_not_gone_on_with_under_other_ids(tmp_path, monkeypatch):
    """Another version of the library may give other ids of the same text, and the plan would not show it."""
    write(tmp_path / "m", form="<s> $A", config={"bos_token": "<s>"})
    how = {"store": tmp_path / "run.zarr", "unit_tokens": 8}
    before = looptap.capture(tmp_path / "m", ["two trains", "late"], **how).load()
    for name in ("complete", "ledger/1.json", "ledger/01.json"):
        (tmp_path / "run.zarr" / ".looptap" / name).unlink(missing_ok=True)
    original = looptap.capture.tokenizer._encode
    monkeypatch.setattr(
        looptap.capture.tokenizer, "_encode", lambda *how: [id or 5 for id in original(*how)][::-1]
    )
    with pytest.raises(OtherPlanError, match=r"holds another token_id than the data give now"):
        looptap.capture(tmp_path / "m", ["two trains", "late"], **how)
    np.testing.assert_array_equal(looptap.open(tmp_path / "run.zarr").token_id, before.token_id)


def test_random_models_read_bytes():
    from looptap.capture.models.load import find_model

    assert model_tokenizer(find_model("random:(0,1x2,0)I,width=16,heads=2")) is BYTES
