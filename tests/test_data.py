"""Datasets in every format: the same rows come out, and a row keeps its number whatever stands around it."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from looptap.capture.data import make_dataset, read_dataset
from looptap.capture.plan import make_plan
from looptap.capture.settings import CaptureSettings
from looptap.capture.tokenizer import BYTES, open_tokenizer
from looptap.errors import UserError

# accents, three-byte signs, a four-byte one, and two line separators that are no line ends in these files
TEXTS = ["Hello there.", "naïve – 数学", "", "a\u2028b\x0cc", "🙂" * 5, "tab\tand 'quotes' \"too\""]


def rows_of(dataset) -> list[list[int]]:
    return [row.tolist() for row in dataset.rows]


def as_bytes(texts) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "open"])
def test_text_lines(tmp_path, end, is_closed):
    path = tmp_path / "data.txt"
    path.write_bytes((end.join(TEXTS) + (end if is_closed else "")).encode())
    assert rows_of(read_dataset(path, BYTES)) == as_bytes(TEXTS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_lines(tmp_path, end, ascii_only):
    """Escaped or not, with other fields around; a text may hold line breaks of its own."""
    texts = [*TEXTS, "two\nlines\r\n"]
    lines = [json.dumps({"id": 3, "question": t, "text": 5}, ensure_ascii=ascii_only) for t in texts]
    path = tmp_path / "data.jsonl"
    path.write_bytes(end.join(lines).encode())
    dataset = read_dataset(path, BYTES, field="question")
    assert rows_of(dataset) == as_bytes(texts)
    assert asdict(dataset.identity) == {
        "name": "data.jsonl",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "field": "question",
        "num_rows": 7,
        "num_empty_rows": 1,
    }


@pytest.mark.parametrize("limit", [None, 2])
def test_rows_at_hand_are_those_of_a_file(tmp_path, limit):
    """`looptap.capture` used to write a file of such rows: a capture begun from that file can go on."""
    texts = [*TEXTS, "two\nlines\r\n"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    of_rows, of_file = make_dataset(texts, BYTES, limit=limit), read_dataset(path, BYTES, limit=limit)
    assert rows_of(of_rows) == rows_of(of_file) == as_bytes(texts[:limit])
    assert of_rows.identity == of_file.identity and of_rows.tokenizer is of_file.tokenizer
    ids = [[1, 2, 3], [4], [], [5, 6]]
    ids_ST = np.array([[1, 2, 3], [4, 0, 0], [0, 0, 0], [5, 6, 0]], np.int64)
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": ids_ST, "lengths": np.array([3, 1, 0, 2], np.int64)}, path)
    of_file = read_dataset(path, None, limit=limit)
    for rows in (ids, tuple(map(tuple, ids)), [np.array(row, np.uint16) for row in ids]):
        of_rows = make_dataset(rows, None, limit=limit)
        assert rows_of(of_rows) == rows_of(of_file) == ids[:limit]
        assert of_rows.identity == of_file.identity


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ([], "texts.jsonl holds no tokens in its 0 rows"),
        ([[], []], "ids.safetensors holds no tokens in its 2 rows"),
        (["", "a"], r"texts.jsonl is text and the model has no tokenizer.json"),
        ([[1], "a"], "lists of whole token ids"),
        ([[[1]]], "lists of whole token ids"),
        ([[0.5]], "lists of whole token ids"),
        ([[1], [2, -3]], "ids.safetensors, row 1 holds the token id -3; ids are 0 to"),
    ],
)
def test_rows_that_are_no_data(rows, wrong):
    with pytest.raises(UserError, match=wrong):
        make_dataset(rows, None if rows == ["", "a"] else BYTES)


def test_blank_lines_keep_row_numbers(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "one"}\n   \n\n{"text": "four"}\n')
    dataset = read_dataset(path, BYTES)
    assert rows_of(dataset) == as_bytes(["", "one", "", "", "four"])
    assert dataset.identity.num_empty_rows == 3
    assert dataset.num_tokens == 7


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_token_id_arrays(tmp_path, dtype):
    ids_ST = np.arange(12, dtype=dtype).reshape(3, 4)
    np.save(tmp_path / "data.npy", ids_ST)
    save_file({"input_ids": ids_ST}, tmp_path / "data.safetensors")
    for name in ("data.npy", "data.safetensors"):
        dataset = read_dataset(tmp_path / name, None)
        assert rows_of(dataset) == ids_ST.tolist()
        assert all(row.dtype == np.int32 for row in dataset.rows)
    # stored by columns: the same rows
    np.save(tmp_path / "columns.npy", np.asfortranarray(ids_ST))
    assert rows_of(read_dataset(tmp_path / "columns.npy", None)) == ids_ST.tolist()


def test_ragged_token_ids(tmp_path):
    """What stands past a row's length is padding, whatever its value."""
    ids_ST = np.array([[1, 2, 3], [4, -1, -1], [-1, -1, -1], [5, 6, 99_999_999]])
    save_file({"input_ids": ids_ST, "lengths": np.array([3, 1, 0, 2])}, tmp_path / "data.safetensors")
    assert rows_of(read_dataset(tmp_path / "data.safetensors", None)) == [[1, 2, 3], [4], [], [5, 6]]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "npy", "safetensors"])
def test_limit_takes_the_first_rows(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    ids_ST = np.arange(97, 97 + 12).reshape(4, 3)
    texts = [bytes(row.tolist()).decode() for row in ids_ST]
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        case "txt":
            path.write_text("\n".join(texts))
        case "npy":
            np.save(path, ids_ST)
        case "safetensors":
            save_file({"input_ids": ids_ST}, path)
    assert rows_of(read_dataset(path, BYTES, limit=2)) == ids_ST[:2].tolist()
    assert rows_of(read_dataset(path, BYTES, limit=9)) == ids_ST.tolist()


def write_tokenizer(path, *, truncation: int | None = None):
    """Words to ids, a beginning before every text, and whatever a training run left behind."""
    words = {word: i for i, word in enumerate(["<s>", "<unk>", "the", "cat", "sat", "数学"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if truncation:
        tokenizer.enable_truncation(truncation)
        tokenizer.enable_padding(length=truncation, pad_id=1)
    tokenizer.save(str(path))


@pytest.mark.parametrize("truncation", [None, 3])
def test_tokenizer_json(tmp_path, truncation):
    """Truncation and padding that a file may switch on would drop tokens silently; neither is used."""
    write_tokenizer(tmp_path / "tokenizer.json", truncation=truncation)
    (tmp_path / "data.txt").write_text("the cat sat the cat\nthe dog\n\n数学\n")
    tokenizer = open_tokenizer([tmp_path / "tokenizer.json"])
    dataset = read_dataset(tmp_path / "data.txt", tokenizer)
    assert rows_of(dataset) == [[0, 2, 3, 4, 2, 3], [0, 2, 1], [], [0, 5]]
    assert tokenizer.decode([0, 2, 3]) == "<s> the cat"
    assert tokenizer.name == "tokenizer.json"
    assert tokenizer.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def test_bytes_are_the_other_tokenizer():
    assert BYTES.encode("é\n") == [0xC3, 0xA9, 10]
    assert BYTES.decode([0xC3, 0xA9, 10]) == "é\n"
    assert BYTES.decode([0xC3]) == "\ufffd"


def test_sequence_id_is_the_row_number_whatever_the_order(tmp_path):
    """Units are ordered by length; rows of several lengths, empty ones between them."""
    lengths = [3, 0, 11, 5, 5, 0, 1, 8]
    rows = [np.arange(n) + 10 * i for i, n in enumerate(lengths)]
    path = tmp_path / "data.txt"
    path.write_bytes(b"\n".join(bytes((row % 64 + 32).tolist()) for row in rows) + b"\n")
    settings = CaptureSettings.of(
        model="random:(1,0,0),width=16,heads=2", data=path, store=tmp_path / "s", unit_tokens=12
    )
    plan = make_plan(settings)
    found = plan.coordinates()
    ids, starts, sizes, tokens = (
        found[name][1] for name in ("sequence_id", "sequence_start", "sequence_length", "token_id")
    )
    assert sorted(ids[ids >= 0]) == [i for i, n in enumerate(lengths) if n]
    assert ids.tolist() != sorted(ids.tolist()), "the plan did not reorder, so this test shows nothing"
    for sequence_id, start, size in zip(ids, starts, sizes, strict=True):
        if sequence_id >= 0:
            wanted = (rows[sequence_id] % 64 + 32).tolist()
            assert tokens[start : start + size].tolist() == wanted
