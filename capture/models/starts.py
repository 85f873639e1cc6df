"""States that enter the first recurrence, and directions that replace that of the prelude's output.

What a sequence gets follows from the seed and its id alone, or from a row of a file, so that no batch, device
or order of units changes it.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InitialStateError, InitialStateMissingError
from .description import Description
from .draws import draw_initial_state

SHARED_ID = 2**63 - 1  # no sequence has it; what is held fixed is drawn under it
WORDS = ("random", "fixed", "zero")
TENSOR = "input_states"


@dataclass(frozen=True)
class StatesFile:
    """A checked file of initial states, [S, T, D]."""

    path: Path
    sha256: str

    def rows(self, sequence_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads the initial states of these rows' first tokens, float32 [N, D]."""
        with safe_open(self.path, framework="pt") as file:
            states_STD = file.get_slice(TENSOR)
            parts = [
                states_STD[row : row + 1, :length][0].float()
                for row, length in zip(sequence_ids, lengths, strict=True)
            ]
        return torch.cat(parts)

    def identity(self) -> dict[str, str]:
        """Returns what the plan records of the file: its name and sha256."""
        return {"file": self.path.name, "sha256": self.sha256}


def open_states(path: Path, lengths: Sequence[int], width: int) -> StatesFile:
    """Checks a file of initial states, its header and the values that will be used.

    Args:
        lengths: tokens of each row of the data, which the file must hold.
    Raises:
        InitialStateError: no such file, damaged, of another shape, or not finite where it is used.
    """
    if not os.path.isfile(path):  # also False where it cannot be looked at
        raise InitialStateMissingError(
            f"--initial-state {path} is no file; give {', '.join(WORDS)} or a .safetensors file with {TENSOR}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            if TENSOR not in (names := list(file.keys())):
                raise InitialStateError(
                    f"{path} has no tensor {TENSOR}; it holds {', '.join(names) or 'nothing'}"
                )
            header = file.get_slice(TENSOR)
            shape, dtype = header.get_shape(), header.get_dtype()
    except (SafetensorError, OSError) as error:
        raise InitialStateError(f"{path} is damaged or no safetensors file: {error}") from error
    S, T = len(lengths), max(lengths)
    if len(shape) != 3 or shape[0] < S or shape[1] < T or shape[2] != width:
        raise InitialStateError(
            f"{path}: {TENSOR} is {shape}, and the data's {S} rows of up to {T} tokens at width {width} need "
            f"[{S}, {T}, {width}]; more rows and tokens may be there"
        )
    if dtype not in ("F32", "BF16", "F16", "F64"):
        raise InitialStateError(f"{path}: {TENSOR} is of type {dtype}; floats are wanted")
    with path.open("rb") as file:
        states = StatesFile(path, hashlib.file_digest(file, "sha256").hexdigest())
    for row, length in enumerate(lengths):
        is_finite_T = states.rows([row], [length]).isfinite().all(-1)
        if not is_finite_T.all():
            position = int(is_finite_T.logical_not().nonzero()[0])
            raise InitialStateError(
                f"{path}: {TENSOR} of row {row}, position {position} is not finite in float32"
            )
    return states


def check_start(wanted: str | None, description: Description) -> None:
    """Refuses a way to start that the model does not have.

    Raises:
        InitialStateError: says which way it starts.
    """
    d = description
    if wanted is None:
        return
    if not d.loops:
        raise InitialStateError(f"--initial-state: {d.notation} has no loop that could start from anything")
    if wanted in WORDS and d.initial_state == "prelude":
        raise InitialStateError(
            f"--initial-state {wanted}: this model's loop starts from the prelude's output; give a file, or "
            "replace that output with --prelude-output"
        )


def initial_state(
    wanted: str | None,
    description: Description,
    seed: int,
    sequence_ids: Sequence[int],
    lengths: Sequence[int],
    file: StatesFile | None,
) -> Tensor | None:
    """Returns the states that enter the first recurrence, float32 [N, D] on the CPU; None: the prelude's
    output.

    Args:
        wanted: one of `WORDS`, or anything else for the file; None for the model's own way.
    """
    d = description
    if file is not None:
        return file.rows(sequence_ids, lengths)
    if d.initial_state == "prelude":
        return None
    if wanted == "zero":
        return torch.zeros(sum(lengths), d.width)
    ids = [SHARED_ID] * len(lengths) if wanted == "fixed" else sequence_ids
    return draw_initial_state(
        seed, ids, lengths, d.width, d.initial_std, truncated=d.initial_state == "truncated"
    )


def prelude_direction(
    wanted: str, seed: int, sequence_ids: Sequence[int], lengths: Sequence[int], width: int
) -> Tensor | None:
    """Returns directions to turn the prelude's output to, float32 [N, D] on the CPU; None: it stays."""
    if wanted == "model":
        return None
    ids = [SHARED_ID] * len(lengths) if wanted == "fixed" else sequence_ids
    rows = [
        # a counter of its own, so that it is independent of the initial state and of token samples
        np.random.Generator(np.random.Philox(key=[seed, sequence_id], counter=[0, 0, 0, 2])).standard_normal(
            (length, width), dtype=np.float32
        )
        for sequence_id, length in zip(ids, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))
