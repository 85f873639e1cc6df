"""The two places where a running model can be listened to: attention, and the residual add.

A model runs both through the tap it is handed. `Plain` is the tap that measures nothing and costs nothing;
whoever wants to see more derives from it. Every call carries the step (stage, layer, recurrence) that the
loop itself is at, so nothing counts calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ...kernels import attention as attention_kernel
from ...kernels.residual_norm import Residual, residual_norm
from .description import Step

Half = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Packed:
    """Whole sequences, one after the other, without padding."""

    token_id_N: Tensor  # int64
    lengths: tuple[int, ...]  # tokens of each sequence; they add up to N
    given_position_N: Tensor | None = None  # int64; positions other than 0, 1, 2, ... of each sequence

    @cached_property
    def position_N(self) -> Tensor:
        """What the rotary angles of every token follow: its place in its sequence, unless given."""
        if self.given_position_N is not None:
            return self.given_position_N
        return torch.cat([torch.arange(n) for n in self.lengths]).to(self.token_id_N.device)


@dataclass(frozen=True)
class HalfNorms:
    """The norms that stand at the end of one half of a block; None where there is none."""

    eps: float
    branch_weight_D: Tensor | None = None
    stream_weight_D: Tensor | None = None
    next_weight_D: Tensor | None = None


class Plain:
    """Runs the operations and keeps nothing."""

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        """Attention output [N, H, C] of one block invocation."""
        return attention_kernel.attention(q_NHC, k_NKC, v_NKC, lengths, scale)

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        """Adds a branch to the stream; after half "mlp" the result is the residual that DESIGN calls
        recorded.
        """
        return residual_norm(
            x_ND,
            branch_ND,
            eps=norms.eps,
            branch_weight_D=norms.branch_weight_D,
            stream_weight_D=norms.stream_weight_D,
            next_weight_D=norms.next_weight_D,
        )

    def loop_state(self, recurrence: int, state_ND: Tensor) -> None:
        """Called with what enters the next recurrence, after the rule that ends this one."""
