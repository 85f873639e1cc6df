"""Everything that a user can do wrong, or that a user's machine can refuse, as exceptions.

The class says where it arose (a model, data, a store, ...), its `status` says which kind of failure it is, as
the HTTP status that a server would answer:

    400  the request is malformed: a spec, selection or option that cannot be read, whatever it is applied to
    404  what is named is not there: a model, a file, a store, a unit
    409  it clashes with what is there: another plan, another driver, a path that is taken
    422  it is understood and cannot be done: data that do not fit the model, fields that are not known
    503  it cannot be done now: no room on the disk, no workers, no answer from the Hub or S3

`RequestError`, `NotFoundError`, `ConflictError`, `UnfitError` and `UnavailableError` are for what no other
class names. The message says what was wrong, with the value, and what to do; the command line prints it alone
and exits with 2. Any other exception is a fault of looptap. Every part but the kernels imports this module,
and it imports nothing of ours. The builtin bases are for callers that catch ValueError or OSError.
"""

from typing import ClassVar


class UserError(Exception):
    """Base of every error that a user can act on; what is raised is one of its subclasses."""

    status: ClassVar[int]
    """Kind of the failure, as an HTTP status: 400, 404, 409, 422 or 503."""


class RequestError(UserError, ValueError):
    """An option, selection or spec that cannot be read, or whose value is out of its range."""

    status = 400


class NotFoundError(UserError, LookupError):
    """Something that is named is not there."""

    status = 404


class ConflictError(UserError):
    """What is asked for clashes with what is there or is going on."""

    status = 409


class UnfitError(UserError, ValueError):
    """What is asked for is understood and cannot be done with these data, this model or this store."""

    status = 422


class UnavailableError(UserError):
    """What is asked for cannot be done now or on this machine, and may be later or elsewhere."""

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


class HubError(ModelError):
    """The Hub did not answer, or did not give a file whole."""

    status = 503


class InitialStateError(UserError, ValueError):
    """Initial states that do not fit the model or the data; says what would."""

    status = 422


class DataError(UserError, ValueError):
    """Data that cannot be captured as it is; says which row and why."""

    status = 422


class PlanError(UserError, ValueError):
    """Settings that do not fit the data or the model."""

    status = 422


class OtherPlanError(PlanError):
    """The store at the path was begun with another plan."""

    status = 409


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


class StoreFullError(StoreError):
    """The disk, the quota or the file size limit is exhausted."""

    status = 503


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
