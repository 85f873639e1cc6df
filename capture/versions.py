"""What ran, for plans and receipts."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Python and the packages that numbers and formats depend on."""
    names = ("looptap", "torch", "numpy", "zarr", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
