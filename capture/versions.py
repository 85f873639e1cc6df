"""What ran, for plans and receipts."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Python and the packages that numbers and formats depend on; Triton where it is installed."""
    names = ("looptap", "torch", "numpy", "zarr", "safetensors", "tokenizers")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    try:
        return found | {"triton": version("triton")}
    except PackageNotFoundError:  # a machine without a GPU does without
        return found
