"""The places where a running model can be listened to, and changed: attention, the residual add, and what
enters and leaves the loop.

A model runs them through the tap it is handed. `Plain` is the tap that measures nothing and costs nothing;
whoever wants to see more derives from it. Every call carries the step that the model itself is at (block,
stage, layer, recurrence), so nothing counts calls.
"""

from dataclasses import InitVar, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...kernels.attention import attention, make_cu_seqlens
from ...kernels.residual_norm import Residual, residual_norm
from .loop_schedule import Step

Half = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Packed:
    """Whole sequences, one after the other, without padding."""

    token_id_N: Tensor  # int64
    lengths: tuple[int, ...]  # tokens of each sequence; they add up to N
    given_position_N: InitVar[Tensor | None] = None  # positions other than 0, 1, 2, ... of each sequence
    position_N: Tensor = field(init=False)  # int64, what the rotary angles of every token follow
    # int32 [S + 1], where each sequence begins and the last one ends
    cu_seqlens_S: Tensor = field(init=False)

    def __post_init__(self, given_position_N: Tensor | None) -> None:
        # made here and not when asked for: torch.compile takes them for inputs of its graph
        device, position_N = self.token_id_N.device, given_position_N
        if position_N is None:
            position_N = torch.cat([torch.arange(n) for n in self.lengths]).to(device)
        object.__setattr__(self, "position_N", position_N)
        object.__setattr__(self, "cu_seqlens_S", make_cu_seqlens(self.lengths, device))

    @property
    def max_length(self) -> int:
        return max(self.lengths)


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
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        """Attention output [N, H, C] of one block invocation."""
        return attention(q_NHC, k_NKC, v_NKC, batch.cu_seqlens_S, batch.max_length, scale)

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        """Adds a branch to the stream; returns the sum, which after half "mlp" is the recorded residual."""
        return residual_norm(x_ND, branch_ND, **vars(norms))

    def prelude(self, output_ND: Tensor) -> Tensor:
        """Takes what the prelude leaves, [N, D]; returns what the loop gets of it."""
        return output_ND

    def loop_state(self, step: Step, state_ND: Tensor) -> None:
        """Called with what enters the next recurrence, after the rule that ends this one.

        Args:
            step: the last of the recurrence that has ended.
        """
