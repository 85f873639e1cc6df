"""Everything that a user can do wrong, or that a user's machine can refuse, as exceptions.

The class says where it arose (a model, data, a store, ...), its `status` says which kind of failure it is, as
the HTTP status that a server would answer:

    400  the request is malformed: a spec, selection or option that cannot be read, whatever it is applied to
    404  what is named is not there: a model, a file, a store, a unit
    409  it clashes with what is there: another plan, another driver, a path that is taken
    422  it is understood and cannot be done: data that do not fit the model, fields that are not known
    503  it cannot be done now: no room on the disk, no workers, no answer from the Hub or S3

`RequestError`, `UnfitError` and `UnavailableError` are for what no other class names. The message says what
was wrong, with the value, and what to do; the command line prints it alone and exits with 2. Any other
exception is a fault of looptap. The builtin bases are for callers that catch ValueError or OSError.

Every part but the kernels imports this module, and it imports nothing of ours.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # EFBIG: a file size limit of the shell or the file system
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class UserError(Exception):
    """Base of every error that a user can act on; only its subclasses are raised."""

    status: ClassVar[int]
    """Kind of the failure, as an HTTP status: 400, 404, 409, 422 or 503."""

    def __str__(self) -> str:
        """Returns the message as any terminal, log or JSON takes it: see `plain`."""
        return plain(super().__str__())


class RequestError(UserError, ValueError):
    """An option, selection or spec that cannot be read, or whose value is out of its range."""

    status = 400


class UnfitError(UserError, ValueError):
    """What is asked for is understood and cannot be done with these data, this model or this store."""

    status = 422


class UnavailableError(UserError):
    """What is asked for cannot be done now or on this machine, and may be later or elsewhere."""

    status = 503


class FileError(UserError, OSError):
    """A file or directory that a user named cannot be read or written."""

    status = 422


class FileMissingError(FileError, FileNotFoundError):
    """There is no such file."""

    status = 404


class PathTakenError(FileError):
    """The path is a directory where a file is wanted, or a file where a directory is."""

    status = 409


class DiskFullError(FileError):
    """The disk, the quota or the file size limit is exhausted."""

    status = 503


class ModelError(UserError, ValueError):
    """A model that cannot be used as it is given; says what is wrong with it and what would be right."""

    status = 422


class ModelSpecError(ModelError):
    """A model spec that cannot be read."""

    status = 400


class ModelMissingError(ModelError):
    """There is no model, or no such file of a model, where the spec names it."""

    status = 404


class DescriptionError(ModelError):
    """Numbers of layers, heads or recurrences that make no model."""


class ModelTooLargeError(ModelError):
    """The weights do not fit into this machine's memory."""

    status = 503


class HubError(ModelError):
    """Files of a model cannot be fetched for now: no answer, a file that came damaged, no room for them."""

    status = 503


class InitialStateError(UserError, ValueError):
    """Initial states that do not fit the model or the data; says what would."""

    status = 422


class InitialStateMissingError(InitialStateError):
    """There is no file of initial states at the path."""

    status = 404


class DataError(UserError, ValueError):
    """Data that cannot be captured as it is; says which row and why."""

    status = 422


class DataMissingError(DataError):
    """There is no file of data at the path."""

    status = 404


class TokenizerError(DataError):
    """A model's tokenizer cannot be used, or its files say one thing and do another."""


class SelectionError(UserError, ValueError):
    """A selection of states, halves of blocks or tokens that cannot be read."""

    status = 400


class NoSuchDepthError(SelectionError):
    """A selection names what this model does not have."""

    status = 422


class QuantityError(UserError, ValueError):
    """A quantity that there is not, or that this model does not have."""

    status = 422


class PlanError(UserError, ValueError):
    """Settings that do not fit the data or the model."""

    status = 422


class OtherPlanError(PlanError):
    """The store at the path was begun with another plan."""

    status = 409


class NoRoomError(PlanError):
    """The disk has less room than the capture may need."""

    status = 503


class EngineError(UserError, ValueError):
    """Workers that the settings ask for and that cannot be had here."""

    status = 422


class RecipeError(UserError, ValueError):
    """What a worker was to be built from is not there, or is something else."""

    status = 409


class ClusterError(UserError, OSError):
    """There is no Ray, or no cluster, that the capture could use."""

    status = 503


class NoWorkersError(UserError, OSError):
    """No worker is left and none can come; what is committed stays."""

    status = 503


class WatchError(UserError, ValueError):
    """A module, a call or a setting that cannot be watched exactly; the message says what to do."""

    status = 422


class StoreError(UserError, OSError):
    """A store cannot be made, read or written; the message says what to do."""

    status = 422


class StoreExistsError(StoreError, FileExistsError):
    """The path a store should be made at is taken."""

    status = 409


class StoreMissingError(StoreError, FileNotFoundError):
    """There is no store at the path."""

    status = 404


class StoreAddressError(StoreError):
    """What was given as a store is no directory or s3://bucket/prefix, or AWS_* variables name no server."""

    status = 400


class BucketMissingError(StoreError):
    """There is no such bucket."""

    status = 404


class StoreUnreadableError(StoreError):
    """Bytes of a store could not be read, which does not say that they are damaged."""

    status = 503


class StoreDamagedError(StoreError):
    """Bytes of a store were read and are not what was written, or are missing."""


class NoFileError(StoreError):
    """A folder, link or pipe has the name of a file of the store."""

    status = 409


class StoreUnreachableError(StoreError):
    """An object store does not answer, or cannot be reached from here."""

    status = 503


class StoreRefusedError(StoreError):
    """The store's place takes nothing more: it became read-only, permission is missing, or it is full."""

    status = 503


class StoreDeniedError(StoreUnreadableError, StoreRefusedError):
    """Permission to read files of a store is missing."""


class StoreFullError(StoreRefusedError):
    """The disk, the quota or the file size limit is exhausted."""


class StoreLockedError(StoreError):
    """Another driver is at work on the store."""

    status = 409


class UnitTakenError(StoreError):
    """The unit is committed already, or a later attempt at it has begun: this attempt must stop."""

    status = 409


class MissingUnitsError(UserError, LookupError):
    """What was to be read lies in units that are not committed; the message names them."""

    status = 404


class NoNeuronsError(UserError, ValueError):
    """The plan tells nothing of the model's neurons; the message says why."""

    status = 422


class NothingCapturedError(UserError, ValueError):
    """The store holds no finished sequence yet."""

    status = 422


class CannotTellError(UserError, ValueError):
    """An analysis has no answer from what the store holds; the message says why, or what to capture."""

    status = 422


class FormatError(UserError, ValueError):
    """A table or figure was asked for in a format that is not written."""

    status = 400


class StudyError(UserError, ValueError):
    """Stores that are no depth study, or not all of one."""

    status = 422


class ArchitectureError(UserError, ValueError):
    """Stores that are no architecture study, or not all of one."""

    status = 422


_MAX_MESSAGE = 4000  # characters


def shown(value: object, most: int = 80) -> str:
    """Returns what a user gave, as messages show it: its repr, cut beyond so many characters."""
    return _cut(repr(value), most)


def plain(text: str) -> str:
    """Returns a message without control characters, which are escaped, and no longer than a screen or two."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    return _cut(text, _MAX_MESSAGE)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}… ({len(text):,} characters) …{text[-most // 3 :]}"


@contextmanager
def os_errors_named(path: str | os.PathLike[str], task: Literal["read", "written"]) -> Iterator[None]:
    """Turns the system's errors about a file that a user named into a FileError that names it."""
    try:
        yield
    except (UserError, BrokenPipeError):  # some are OSErrors, and say what to do already
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        path = os.fspath(path) if error.filename is None else error.filename
        message = f"{path} cannot be {task}: {reason}"
        if error.errno in FULL:
            raise DiskFullError(f"{message}; make room and run the same command again") from error
        if isinstance(error, FileNotFoundError):
            raise FileMissingError(message) from error
        if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
            raise PathTakenError(f"{message}; choose another path") from error
        raise FileError(message) from error
