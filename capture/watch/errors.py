"""What `watch` refuses, as one error."""


class WatchError(ValueError):
    """A module, a call or a setting that cannot be watched exactly; the message says what to do."""
