"""Captures: models, taps, plans, workers, engines, the store.

The package can be called, `looptap.capture(model, data)`: what it does and what it is named are one word.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        from .memory import capture

        return capture(*args, **settings)


sys.modules[__name__].__class__ = _Callable
