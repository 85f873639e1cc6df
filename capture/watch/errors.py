"""What `watch` refuses, as one error."""

from collections.abc import Callable
from functools import wraps
from typing import Any


class WatchError(ValueError):
    """A module, a call or a setting that cannot be watched exactly; the message says what to do."""


def remembered(method: Callable[..., None]) -> Callable[..., None]:
    """What a method refuses is told to its object, for a watched module may catch the error and go on."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except WatchError as error:
            self.refuse(error)
            raise

    return wrapped
