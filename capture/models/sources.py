"""Maps the tensors of a checkpoint's files to our parameters, without reading any."""

from dataclasses import dataclass

COMPUTED = ("rotary frequencies", "rotary table")  # what files hold and config.json says as well


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint and the rows of our parameter that it fills."""

    tensor: str
    shape: tuple[int, ...]
    """Shape in the file; the same numbers in the same order fill the parameter, whatever its shape."""
    parameter: str
    first_row: int = 0


@dataclass(frozen=True)
class Copy:
    """A tensor that files may hold besides, and that says again what is known without it."""

    tensor: str
    shape: tuple[int, ...]
    of: str
    """The tensor that it must equal, or one of `COMPUTED`."""
