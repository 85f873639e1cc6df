"""A refusal of `watch` is remembered by the recorder that raised it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from ...errors import WatchError


def remembered(method: Callable[..., None]) -> Callable[..., None]:
    """Keeps a refusal in the method's object, for a watched module may catch the error and go on."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except WatchError as error:
            self.refuse(error)
            raise

    return wrapped
