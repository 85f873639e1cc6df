"""The latent state that enters the first recurrence, drawn so that nobody's batch matters.

Each sequence has a random stream of its own, keyed by the capture's seed and the sequence id, and a
position's state is the next `width` numbers of it. So a token's state is the same in any batch, on any
device, in any order of units, and whatever follows it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CUT = 3.0  # Huginn's and the retrofits' normal ends at so many of its standard deviations


def draw_initial_state(
    seed: int,
    sequence_ids: Sequence[int],
    lengths: Sequence[int],
    width: int,
    std: float,
    truncated: bool = False,
) -> Tensor:
    """Returns initial states, float32 [N, width] on the CPU, normal with mean 0.

    Args:
        std: standard deviation; with `truncated` that of the normal before it is cut at ±3 std, which takes
            1.3 % off.
    """
    draw = _truncated_normal if truncated else _normal
    rows = [
        draw(np.random.Generator(np.random.Philox(key=[seed, sequence_id])), length, width)
        for sequence_id, length in zip(sequence_ids, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows)) * std


def _normal(generator: np.random.Generator, length: int, width: int) -> np.ndarray:
    return generator.standard_normal((length, width), dtype=np.float32)


def _truncated_normal(generator: np.random.Generator, length: int, width: int) -> np.ndarray:
    """Draws by the inverse of the distribution function: one number of the stream a channel, where drawing
    anew whatever is cut off would move all that follows.
    """
    below = torch.special.ndtr(torch.tensor(-CUT, dtype=torch.float64)).item()
    uniform = torch.from_numpy(generator.random((length, width)))  # float64, [0, 1)
    # float64 as far as the tails' ends, where the inverse is steep
    return torch.special.ndtri(below + uniform * (1 - 2 * below)).clamp_(-CUT, CUT).float().numpy()
