"""What can go wrong with a store, as errors a user can act on."""


class StoreError(OSError):
    """A store cannot be made, read or written; the message says what to do."""


class StoreExistsError(StoreError, FileExistsError):
    """The path a store should be made at is taken."""


class StoreMissingError(StoreError, FileNotFoundError):
    """There is no store at the path."""


class StoreFullError(StoreError):
    """The disk, the quota or the file size limit is exhausted."""


class StoreLockedError(StoreError):
    """Another driver is at work on the store."""


class UnitTakenError(StoreError):
    """The unit is committed already, or a later attempt at it has begun: this attempt must stop."""
