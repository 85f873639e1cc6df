"""Block sizes of every kernel, from a committed table; nothing is tried out when a kernel is launched.

A row of `tuned.json` holds for one kernel, padded width and dtype, and for one target and Triton version
or for "any". The most exact row wins; every kernel has rows for "any", which all targets compile without
spills. `make tune` measures candidates on the GPU it runs on and writes rows for it; the ahead-of-time tests
compile every row.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

TABLE_PATH = Path(__file__).with_name("tuned.json")
TRITON = ".".join(triton.__version__.split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of one kernel's tiles and its launch."""

    rows: int
    """Rows of a tile: queries, or rows of the residual."""
    keys: int = 0
    """Columns of a tile: keys. 0 where a tile has the whole width."""
    num_warps: int = 4
    num_stages: int = 1
    """Tiles in flight between memory and a loop."""
    descriptors: bool = False
    """Whether tiles are fetched through tensor descriptors (TMA), by sm_90 and later."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table."""

    kernel: str
    target: str
    """Target of the row: sm_90, gfx942, ... or any."""
    triton: str
    """Major and minor version of Triton, or any."""
    width: int
    """Head width or residual width, the next power of two."""
    dtype: str
    """Class of the dtype: half (bfloat16 and float16) or float32."""
    settings: Settings


def find_settings(
    kernel: str, width: int, dtype: torch.dtype, device: torch.device, *, for_any: bool = False
) -> Settings:
    """Returns the settings that a launch takes.

    Args:
        width: head width, or the residual's; the next power of two is looked up.
        for_any: the row for any target, whatever the device; it fetches through pointers.
    Raises:
        ValueError: the table has no row; with what it has.
    """
    target = "any" if for_any else _target(device)
    return _find(kernel, triton.next_power_of_2(width), dtype_class(dtype), target, TRITON)


def dtype_class(dtype: torch.dtype) -> str:
    """Returns "float32", or "half" for bfloat16 and float16, which take the same settings."""
    return "float32" if dtype == torch.float32 else "half"


def read_table(path: Path | None = None) -> list[Entry]:
    """Reads every row, in the file's order."""
    rows = json.loads((path or TABLE_PATH).read_text())
    return [Entry(**{**row, "settings": Settings(**row["settings"])}) for row in rows]


def write_table(entries: list[Entry], path: Path = TABLE_PATH) -> None:
    """Writes rows, sorted, one a line."""
    ordered = sorted(entries, key=lambda e: (e.kernel, e.dtype, e.width, e.target, e.triton))
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in ordered)
    path.write_text(f"[\n{lines}\n]\n")


@lru_cache
def _find(kernel: str, width: int, dtype: str, target: str, version: str) -> Settings:
    ours = [e for e in read_table() if (e.kernel, e.dtype) == (kernel, dtype)]
    for wanted in ((target, version), (target, "any"), ("any", version), ("any", "any")):
        for entry in ours:
            if entry.width == width and (entry.target, entry.triton) == wanted:
                return entry.settings
    widths = sorted({entry.width for entry in ours})
    raise ValueError(f"{kernel} runs at widths {widths} in {dtype}, not at {width}")


@lru_cache
def _target(device: torch.device) -> str:
    if device.type != "cuda":  # the interpreter, on CPU tensors
        return "any"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
