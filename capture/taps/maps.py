"""The tap that keeps attention matrices of one short prompt; memory grows with the square of its length."""

import torch
from torch import Tensor

from ..models.description import Description
from ..models.loop_schedule import Step
from ..models.tap import Packed, Plain


class Maps(Plain):
    """Keeps attention matrices of one sequence and its last token's loop states."""

    def __init__(self, description: Description, num_tokens: int, device: torch.device) -> None:
        shape = (description.depth, description.num_heads, num_tokens, num_tokens)
        self.maps_LHTT = torch.empty(shape, device=device)
        self.loop_states: list[Tensor] = []

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        k_NHC = k_NKC.repeat_interleave(q_NHC.shape[1] // k_NKC.shape[1], dim=1)
        scores_HTT = torch.einsum("thc,shc->hts", q_NHC.float(), k_NHC.float()) * scale
        future_TT = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
        self.maps_LHTT[step.depth] = scores_HTT.masked_fill(future_TT, float("-inf")).softmax(-1)
        return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)

    def loop_state(self, step: Step, state_ND: Tensor) -> None:
        self.loop_states.append(state_ND[-1:])
