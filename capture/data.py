"""Datasets: rows of text or of token ids, each row one sequence, from a file or from Python. A row's number
is its sequence id for good.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors.numpy

from ..errors import DataError, DataMissingError, RequestError, TokenizerError, os_errors_named
from .store.plan import StoredData
from .tokenizer import Tokenizer

Rows = Iterable[str] | Iterable[Sequence[int]]


@dataclass(frozen=True)
class Dataset:
    """Token ids of every row, int32, in the data's order; empty rows keep their number and hold no ids."""

    rows: list[np.ndarray]
    identity: StoredData
    """The plan's record of the data: its name, the hash of its content, its number of rows."""
    tokenizer: Tokenizer | None = None
    """The model's tokenizer; None where it has none."""
    is_text: bool = False
    """Whether the tokenizer made the ids."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def beginning(self) -> list[tuple[int, str]]:
        """How rows begin: the first ids of the first row of text that has any, each with its text."""
        if self.tokenizer is None or not self.is_text:
            return []
        first = next(row for row in self.rows if len(row))
        return [(int(id), self.tokenizer.decode([int(id)])) for id in first[:4]]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return max(map(len, self.rows))


def read_dataset(
    path: Path, tokenizer: Tokenizer | None, *, field: str = "text", limit: int | None = None
) -> Dataset:
    """Reads and tokenises a whole file.

    Args:
        tokenizer: for .jsonl and .txt; None where the model has none, which only token ids can do without.
        field: field of each .jsonl line. limit: only the first so many rows.
    Raises:
        DataError: no such file or kind, nothing in it, a row that does not fit; names the row, from 0.
    """
    if not os.path.isfile(path):  # also False where it cannot be looked at
        raise DataMissingError(f"{path} is no file; data is a .jsonl, .txt, .npy or .safetensors file")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".txt"):
        texts = islice(_jsonl(path, field) if suffix == ".jsonl" else _lines(path), limit)
        rows = _encode(str(path), tokenizer, texts)
    elif suffix in (".npy", ".safetensors"):
        rows = (_npy(path) if suffix == ".npy" else _safetensors(path))[:limit]
    else:
        raise DataError(
            f"{path}: {suffix or 'no suffix'} is not read; .jsonl, .txt, .npy and .safetensors are"
        )
    _check_not_empty(str(path), rows, limit)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    identity = _identity(path.name, digest, field if suffix == ".jsonl" else None, rows)
    return Dataset(rows, identity, tokenizer, is_text=suffix in (".jsonl", ".txt"))


def make_dataset(rows: Rows, tokenizer: Tokenizer | None, *, limit: int | None = None) -> Dataset:
    """Tokenises rows that are in memory.

    Its identity is that of a file of the same rows, `texts.jsonl` with a field `text` or `ids.safetensors`,
    so that a capture of either goes on with the other's store.

    Args:
        rows: all texts, or all whole token ids.
        tokenizer: for texts; None where the model has none.
        limit: only the first so many rows.
    Raises:
        RequestError: neither texts nor token ids.
        DataError: no tokens at all, a row that does not fit; names the row.
    """
    if isinstance(rows, Mapping | set | frozenset | str | bytes):
        raise RequestError(
            f"data is a {type(rows).__name__}, which has no rows in order; give a file, a list of texts, or "
            "a list of lists of whole token ids"
        )
    given: list[Any] = list(rows)  # it may tell them once
    if all(isinstance(row, str) for row in given):
        name, field = "texts.jsonl", "text"
        content = "".join(json.dumps({field: row}) + "\n" for row in given).encode()
        found = _encode(name, tokenizer, given[:limit])
    else:
        name, field = "ids.safetensors", None
        ids_ST, lengths_S = _padded(given)
        content = safetensors.numpy.save({"input_ids": ids_ST, "lengths": lengths_S})
        found = _matrix_rows(name, ids_ST, lengths_S)[:limit]
    _check_not_empty(name, found, limit)
    identity = _identity(name, hashlib.sha256(content).hexdigest(), field, found)
    return Dataset(found, identity, tokenizer, is_text=field is not None)


def check_rows(dataset: Dataset, vocab_size: int, max_positions: int) -> None:
    """Refuses ids that the model has no embedding for, and sequences longer than its positions."""
    for number, row in enumerate(dataset.rows):
        if len(row) > max_positions:
            raise DataError(
                f"row {number} has {len(row)} tokens and the model takes at most {max_positions}; "
                "shorten it or leave it out"
            )
        if len(row) and not (row.min() >= 0 and row.max() < vocab_size):
            wrong = row[(row < 0) | (row >= vocab_size)][0]
            raise DataError(
                f"row {number} holds the token id {wrong}; this model's vocabulary is 0 to {vocab_size - 1}. "
                "Is this another model's tokenizer?"
            )


def _identity(name: str, sha256: str, field: str | None, rows: list[np.ndarray]) -> StoredData:
    num_empty_rows = sum(not len(row) for row in rows)
    return StoredData(
        name=name, sha256=sha256, field=field, num_rows=len(rows), num_empty_rows=num_empty_rows
    )


def _check_not_empty(name: str, rows: list[np.ndarray], limit: int | None) -> None:
    if not any(map(len, rows)):
        raise DataError(
            f"{name} holds no tokens in its {len(rows)} rows" + (f" (limit {limit})" if limit else "")
        )


def _encode(name: str, tokenizer: Tokenizer | None, texts: Iterable[str]) -> list[np.ndarray]:
    if tokenizer is None:
        raise DataError(
            f"{name} is text and the model has no tokenizer.json beside it, nor another form of a tokenizer; "
            "give token ids instead"
        )
    rows = []
    for number, text in enumerate(texts):
        try:
            # no text, no tokens: a tokenizer may put a beginning before nothing at all
            rows.append(np.array(tokenizer.encode(text) if text else [], dtype=np.int32))
        except UnicodeEncodeError as error:  # half a surrogate pair is no UTF-8
            raise DataError(f"{name}, row {number}: {tokenizer.name} cannot read it: {error}") from error
        except TokenizerError:
            raise
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from error
    return rows


def _padded(rows: Iterable[Sequence[int]] | Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as a matrix, int64 [S, T], and their lengths, int64 [S]."""
    arrays = [np.asarray(row) for row in rows]
    if any(row.ndim != 1 or (len(row) and row.dtype.kind not in "iu") for row in arrays):
        raise RequestError("data must be a file, a list of texts, or a list of lists of whole token ids")
    lengths_S = np.array([len(row) for row in arrays], np.int64)
    ids_ST = np.zeros((len(arrays), max(lengths_S, default=0)), np.int64)
    for padded_T, row in zip(ids_ST, arrays, strict=True):
        padded_T[: len(row)] = row
    return ids_ST, lengths_S


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path)):
        if not line.strip():
            yield ""
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, row {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}, row {number}: no text field {field!r}; it holds {found}. Choose with --field"
            )
        yield record[field]


def _lines(path: Path) -> Iterator[str]:
    try:
        with os_errors_named(path, "read"), path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _npy(path: Path) -> list[np.ndarray]:
    try:
        ids_ST = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise DataError(f"{path} is no .npy array of numbers: {error}") from error
    if not isinstance(ids_ST, np.ndarray):
        raise DataError(f"{path} is an archive; a single .npy array of token ids [S, T] is wanted")
    return _matrix_rows(str(path), ids_ST, None)


def _safetensors(path: Path) -> list[np.ndarray]:
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or no safetensors file: {error}") from error
    except (KeyError, TypeError) as error:  # a dtype that NumPy lacks
        raise DataError(f"{path}: input_ids and lengths must be integers; {error}") from error
    if "input_ids" not in tensors:
        raise DataError(f"{path} has no tensor input_ids; it holds {', '.join(tensors) or 'nothing'}")
    return _matrix_rows(str(path), tensors["input_ids"], tensors.get("lengths"))


def _matrix_rows(name: str, ids_ST: np.ndarray, lengths_S: np.ndarray | None) -> list[np.ndarray]:
    if ids_ST.ndim != 2 or ids_ST.dtype.kind not in "iu":
        raise DataError(f"{name}: token ids must be integers [S, T], got {ids_ST.dtype} {list(ids_ST.shape)}")
    S, T = ids_ST.shape
    lengths_S = np.full(S, T) if lengths_S is None else lengths_S
    if (
        lengths_S.shape != (S,)
        or lengths_S.dtype.kind not in "iu"
        or (S and not (lengths_S.min() >= 0 and lengths_S.max() <= T))
    ):
        raise DataError(f"{name}: lengths must be {S} whole numbers from 0 to {T}")
    limits = np.iinfo(np.int32)
    rows = [row[:length] for row, length in zip(ids_ST, lengths_S, strict=True)]
    for number, row in enumerate(rows):
        if len(row) and (int(row.min()) < 0 or int(row.max()) > limits.max):
            wrong = row[(row < 0) | (row > limits.max)][0]
            raise DataError(f"{name}, row {number} holds the token id {wrong}; ids are 0 to {limits.max}")
    return [row.astype(np.int32) for row in rows]
