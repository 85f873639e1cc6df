"""Models from the Hugging Face Hub, in the cache of its own library: ORG/NAME or ORG/NAME@REVISION.

Asked for are small files (config.json, the tokenizer's, the index of the weights, what would make another
model of them) and the safetensors files of the index: the small files first, the weights when they are
needed, one after another, as Ctrl-C does not stop the threads of `snapshot_download` before their files are
complete.
Tokens, logins, offline mode, retries, locks and progress bars are the library's.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import HubError, ModelError, ModelMissingError, ModelSpecError, UserError
from .other_files import (
    ADAPTERS,
    INDEX,
    QUANTISED,
    SINGLE,
    TOKENIZER_EXTRAS,
    TOKENIZER_MODELS,
    refuse_other_files,
    two_sets,
)

FORMS = (
    "a model is a directory with config.json and *.safetensors, a Hub id ORG/NAME or ORG/NAME@REVISION "
    "(branch, tag or commit), or a random: spec"
)
CONFIG = "config.json"
_WEIGHTS = re.compile(r"[\w][\w.-]*\.safetensors", re.ASCII)
_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_ID = re.compile(f"{_PART}/{_PART}", re.ASCII)
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_MORE_DISK = "free some, or let HF_HOME name a directory on a larger disk"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository; its small files are in the cache, its weights perhaps not yet."""

    id: str
    revision: str | None
    """The branch, tag or commit that was asked for; None for the main branch."""
    commit: str
    """The commit that the revision named when it was looked up, 40 hex digits."""
    path: Path
    """Folder of the commit in the cache."""
    weights: tuple[str, ...]
    """Names of the safetensors files that hold the model."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Weights that are not in the cache."""
        return tuple(name for name in self.weights if not (self.path / name).is_file())


def fetch_model(spec: str) -> Snapshot:
    """Resolves the revision and fetches the small files.

    Where the Hub cannot be asked, the commit that the cache has for the revision is taken.

    Args:
        spec: ORG/NAME or ORG/NAME@REVISION.
    Raises:
        ModelError: no such form, repository, revision or file; no right to read it; no network, disk or
            cache. One message that says what to do.
    """
    id, at, revision = spec.partition("@")
    if _ID.fullmatch(id) is None or "--" in id or ".." in id:
        raise ModelSpecError(
            f"{id!r} is no Hub id, which reads ORG/NAME in letters, digits, - _ and .; {FORMS}"
        )
    if at and (not re.fullmatch(r"[\w./-]+", revision, re.ASCII) or ".." in revision or revision[0] in "/-"):
        raise ModelSpecError(
            f"{spec!r} asks for revision {revision!r}, which no branch, tag or commit is called"
        )
    with one_message(spec):
        config_path = _fetch(id, CONFIG, revision or "main")
        if config_path is None:
            raise ModelMissingError(
                f"{spec} holds no {CONFIG}, so it is no model that looptap reads; {FORMS}"
            )
        commit = config_path.parent.name
        small = ("tokenizer.json", *TOKENIZER_EXTRAS, ADAPTERS[0], *QUANTISED)
        found = [name for name in small if _fetch(id, name, commit)]
        refuse_other_files(id, found)
        if "tokenizer.json" not in found:
            for name in TOKENIZER_MODELS:
                _fetch(id, name, commit)
        index_path = _fetch(id, INDEX, commit)
        weights = (SINGLE,) if index_path is None else _read_index(id, index_path)
        snapshot = Snapshot(id, revision or None, commit, config_path.parent, weights)
        if SINGLE not in weights and snapshot.missing and _exists(id, SINGLE, commit):
            raise two_sets(id)
        return snapshot


def fetch_weights(snapshot: Snapshot, num_bytes: int) -> None:
    """Fetches what the cache lacks; files that are complete stay there if a later one fails.

    Args:
        num_bytes: bytes that they will take, compared with the free disk first.
    Raises:
        ModelError: as `fetch_model`; also a file that is not what the Hub said it would be.
    """
    missing, free = snapshot.missing, shutil.disk_usage(snapshot.path).free
    if missing and num_bytes > free:
        raise HubError(
            f"{snapshot.id} takes {num_bytes / 2**20:,.1f} MiB more in {snapshot.path.parents[2]}, and its "
            f"disk has {free / 2**20:,.1f} MiB free; {_MORE_DISK}"
        )
    with one_message(snapshot.id):
        for name in missing:
            path = _fetch(snapshot.id, name, snapshot.commit)
            if path is None:
                raise lacking(snapshot.id, name, snapshot.commit)
            _check_content(snapshot.id, path)


def _fetch(id: str, name: str, revision: str) -> Path | None:
    """A file in the cache, fetched if need be; None where the repository has none of that name."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if _COMMIT.fullmatch(revision):  # a commit's files never change; a branch must be asked for
        cached = try_to_load_from_cache(id, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:  # the mark of a file that is not there
            return None
    try:
        return Path(hf_hub_download(id, name, revision=revision))
    except LocalEntryNotFoundError:  # nobody could be asked, so it is not known
        raise
    except EntryNotFoundError:
        return None


def _exists(id: str, name: str, commit: str) -> bool:
    """Whether a repository has a file, which is not fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(id, name, revision=commit))
    except EntryNotFoundError:
        return False
    return True


def _read_index(id: str, path: Path) -> tuple[str, ...]:
    try:
        names = {str(name) for name in json.loads(path.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{id}: its {INDEX} has no weight_map of tensors to files") from error
    if strange := sorted(name for name in names if not _WEIGHTS.fullmatch(name)):
        raise ModelError(f"{id}: its {INDEX} names {strange[0]!r}, which is no safetensors file beside it")
    return tuple(sorted(names))


def _check_content(id: str, path: Path) -> None:
    """Compares a file that has just come with the SHA-256 that the Hub announced: its name in the cache.

    The library compares lengths alone.
    """
    wanted = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not _SHA256.fullmatch(wanted):  # a cache without links
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == wanted:
            return
    path.resolve().unlink()
    path.unlink()
    raise HubError(
        f"{id}: {path.name} came damaged, its SHA-256 is not {wanted}; it was removed, run the command again"
    )


def lacking(id: str, name: str, commit: str) -> ModelError:
    """Returns the error for a repository without such weights."""
    from huggingface_hub import HfApi

    files = sorted(file for file in HfApi().list_repo_files(id, revision=commit) if "/" not in file)
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        return ModelError(
            f"{id} holds its weights only as pickles ({', '.join(pickles)}), which can run code when opened; "
            "looptap reads safetensors: choose a revision that has them, or convert it"
        )
    if name == SINGLE:
        return ModelMissingError(f"{id} holds neither {SINGLE} nor {INDEX}; its files are {', '.join(files)}")
    return ModelMissingError(f"{id} lacks {name}, which its {INDEX} names; tell its authors")


@contextmanager
def one_message(spec: str) -> Iterator[None]:
    """Turns whatever the library raises into one message that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its versions stand on three HTTP clients, each with errors of its own
        raise _explain(error, spec) from error


def _explain(error: Exception, spec: str) -> ModelError:
    from huggingface_hub import constants, errors

    id, _, revision = spec.partition("@")
    login = "log in with `hf auth login` or set HF_TOKEN"
    is_unasked = isinstance(error, errors.LocalEntryNotFoundError)
    if is_unasked and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
    code = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{id} is gated: accept its terms at {constants.ENDPOINT}/{id}, then {login}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelMissingError(
            f"the Hub has no model {id} that you may read, and there is no such directory here; check the "
            f"name, and if it is private, {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelMissingError(
            f"{id} has no branch, tag or commit {revision or 'main'}; see {constants.ENDPOINT}/{id}/commits"
        )
    if code in (401, 403):
        return ModelError(
            f"the Hub refuses the token that it was sent for {id} ({code}); use one that may read it: {login}"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return HubError(
            f"the disk of {constants.HF_HUB_CACHE} filled up while {id} was fetched; {_MORE_DISK}; the same "
            "command goes on with the files that are complete"
        )
    if isinstance(error, errors.SafetensorsParsingError):
        return ModelError(
            f"{spec} has weights that are not what their names say ({reason}); tell its authors"
        )
    if constants.HF_HUB_OFFLINE:
        return HubError(
            f"HF_HUB_OFFLINE is set and the cache, {constants.HF_HUB_CACHE}, lacks files of {spec}; run the "
            "command once without it, or copy the cache of a machine that has them"
        )
    if is_unasked:
        return HubError(
            f"{constants.ENDPOINT} could not be asked for {spec} ({reason}), and the cache, "
            f"{constants.HF_HUB_CACHE}, lacks files of it; check the network and run the command again"
        )
    return HubError(
        f"{spec} could not be fetched from {constants.ENDPOINT} ({reason}); the same "
        "command goes on with the files that are complete"
    )
