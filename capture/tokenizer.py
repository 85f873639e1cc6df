"""The tokenizer of a model's directory, as transformers' AutoTokenizer makes it of all of its files.

tokenizer.json is not all of it: tokenizer_config.json, special_tokens_map.json and added_tokens.json may add
tokens, split special ones in text, or name a class that pays no heed to parts of tokenizer.json. What decides
the first token, the sink of every attention figure, is looked at here: where the files say one thing and the
library does another, as versions of it do, the user is asked.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, TokenizerError, os_errors_named, shown
from .models.load import ModelSource

SpecialTokens = Literal["model", "none", "bos"]
_PROBE = "a"  # whose ids show what is put around a text


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into token ids and back; a plan records its name and hash."""

    name: str
    sha256: str | None
    encode: Callable[[str], list[int]]
    """Raises DataError: the text cannot be read, or would begin twice; TokenizerError: no text can be."""
    decode: Callable[[list[int]], str]


BYTES = Tokenizer(
    "bytes", None, lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace")
)
"""Plain UTF-8 bytes, for randomly initialised models."""


def model_tokenizer(source: ModelSource, special_tokens: SpecialTokens = "model") -> Tokenizer | None:
    """Returns a model's own tokenizer: bytes for a randomly initialised one, None where its files have none.

    Args:
        special_tokens: `model`, what the model's files put around a text; `none`; or `bos`, the token that
            begins a sequence, once and nothing else.
    Raises:
        TokenizerError: bytes have no special tokens.
    """
    if source.spec.startswith("random:"):
        if special_tokens == "bos":
            raise TokenizerError(
                f"--special-tokens bos: {source.spec} reads bytes, which have no beginning token"
            )
        return BYTES
    files = source.origin.tokenizer_files
    return open_tokenizer(files, special_tokens) if files else None


def open_tokenizer(files: Sequence[Path], special_tokens: SpecialTokens = "model") -> Tokenizer:
    """Opens the tokenizer that files of one directory make; they are read when it is first used.

    Args:
        files: the first is its model, tokenizer.json if there is one.
    """
    digest = hashlib.sha256(files[0].read_bytes())
    for path in files[1:]:
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    loaded = _OfDirectory(files[0].parent, special_tokens)
    return Tokenizer(files[0].name, digest.hexdigest(), loaded.encode, loaded.decode)


@dataclass
class _OfDirectory:
    folder: Path
    special_tokens: SpecialTokens

    def encode(self, text: str) -> list[int]:
        ids = self._ids(text, self.special_tokens == "model")
        bos = self._library.bos_token_id
        if self.special_tokens == "bos":
            if bos is None:
                raise TokenizerError(
                    f"--special-tokens bos: the tokenizer of {self.folder} names no bos_token"
                )
            return ids if ids[:1] == [bos] else [bos, *ids]
        if self.special_tokens == "model" and bos is not None and ids[:2] == [bos, bos]:
            raise DataError(
                f"it begins with {self._library.bos_token} and the tokenizer puts another one before it; "
                "take it out of the text, or give --special-tokens none or bos"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        with _named(self.folder):
            how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            return str(self._library.decode(ids, **how))

    @cached_property
    def _library(self) -> Any:
        from transformers import AutoTokenizer

        with _named(self.folder, TokenizerError), _quiet():
            library = AutoTokenizer.from_pretrained(
                str(self.folder), trust_remote_code=False, local_files_only=True
            )
        if self.special_tokens == "model":
            self._check_ends(library)
        return library

    def _ids(self, text: str, has_special: bool) -> list[int]:
        library = self._library
        with _named(self.folder), _quiet():
            return _encode(library, text, has_special)

    def _check_ends(self, library: Any) -> None:
        """Refuses a tokenizer_config.json that says other than what comes out."""
        path = self.folder / "tokenizer_config.json"
        if not path.is_file():
            return
        with _named(path, TokenizerError), os_errors_named(path, "read"):
            config = json.loads(path.read_text())
        with _named(self.folder, TokenizerError), _quiet():
            bare, whole = _encode(library, _PROBE, False), _encode(library, _PROBE, True)
        ends = {
            "bos": bare[:1] != whole[:1] == [library.bos_token_id],
            "eos": bare[-1:] != whole[-1:] == [library.eos_token_id],
        }
        for name, is_added in ends.items():
            said = config.get(f"add_{name}_token")
            if isinstance(said, bool) and said != is_added:
                from transformers import __version__

                raise TokenizerError(
                    f"{path} says add_{name}_token {str(said).lower()}, and transformers {__version__} adds "
                    f"{'one' if is_added else 'none'}, in which its versions differ: give --special-tokens "
                    "bos for the beginning token alone, or --special-tokens none"
                )


def _encode(library: Any, text: str, has_special: bool) -> list[int]:
    return list(library(text, add_special_tokens=has_special, verbose=False)["input_ids"])


@contextmanager
def _named(path: Path, kind: type[DataError] = DataError) -> Iterator[None]:
    """Turns whatever the libraries raise, Rust's panics too, into an error that names the files."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0]
        raise kind(f"the tokenizer of {path} cannot be used: {shown(reason, 300)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from advising on what it is asked for here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
