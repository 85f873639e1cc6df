"""Versions of the software that ran, for plans and receipts."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Returns versions of Python, of what numbers and formats depend on, and of Triton if installed."""
    names = ("looptap", "torch", "numpy", "zarr", "safetensors", "transformers", "tokenizers")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    try:
        return found | {"triton": version("triton")}
    except PackageNotFoundError:  # a machine without a GPU does without
        return found
