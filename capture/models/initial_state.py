"""The latent state that enters the first recurrence, drawn so that nobody's batch matters.

Each sequence has a random stream of its own, keyed by the capture's seed and the sequence id, and a
position's state is the next `width` numbers of it. So a token's state is the same in any batch, on any
device, in any order of units, and whatever follows it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw_initial_state(
    seed: int, sequence_ids: Sequence[int], lengths: Sequence[int], width: int, std: float
) -> Tensor:
    """Float32 [N, width] on the CPU, normal with mean 0 and the given standard deviation."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, sequence_id])).standard_normal(
            (length, width), dtype=np.float32
        )
        for sequence_id, length in zip(sequence_ids, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows)) * std
