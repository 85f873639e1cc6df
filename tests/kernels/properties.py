"""hypothesis where it is installed. A machine with a GPU may lack it: property tests then say so and skip,
and all others run. `make test` installs it.
"""

from typing import Any

import pytest

try:
    from hypothesis import given, settings, strategies
except ImportError:

    class _Anything:
        """Takes the place of strategies, which are made when a test is defined."""

        def __getattr__(self, name: str) -> "_Anything":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Anything":
            return self

    strategies = _Anything()

    def given(*args: Any, **kwargs: Any) -> Any:

        def replace(test: Any) -> Any:
            def skipped() -> None:  # without the arguments, which pytest would look for
                pytest.skip("hypothesis is not installed")

            return skipped

        return replace

    def settings(**kwargs: Any) -> Any:
        return lambda test: test


__all__ = ["given", "settings", "strategies"]
