"""Ouro's exit gate as a distribution over recurrences.

A recorded output only: every recurrence runs. In bfloat16 the cumulative sum can reach 1 before the last
recurrence, so a threshold of 1 would not always mean the last one; here everything is float32.
"""

import torch
from torch import Tensor


def exit_probability(gate_logits_RN: Tensor) -> Tensor:
    """Probability of leaving after each recurrence; every token's add up to 1.

    p_r = λ_r · Π_{j<r} (1 − λ_j) with λ = sigmoid(logit); the last recurrence takes what is left, whatever
    its gate says.

    Args:
        gate_logits_RN: `LoopedModel.exit_gate_logits` of every recurrence, any float dtype.
    Returns:
        float32 [R, N].
    Source: arXiv 2510.25741 (Ouro), and the code published with its checkpoints.
    """
    logits_RN = gate_logits_RN.float()
    # 1 − sigmoid(x) = sigmoid(−x), without the cancellation of a confident gate
    left_RN = torch.sigmoid(-logits_RN[:-1]).cumprod(0)
    reached_RN = torch.cat([torch.ones_like(logits_RN[:1]), left_RN])
    leaving_RN = torch.cat([torch.sigmoid(logits_RN[:-1]), torch.ones_like(logits_RN[:1])])
    return leaving_RN * reached_RN
