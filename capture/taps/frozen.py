"""Runs one recurrence again, in which every token sees itself as it is now and all others as they were.

`KeysValues` keeps what attention reads during one recurrence; `OthersFrozen` runs another from it. There a
token's next state owes nothing to what the others are now, so that one product with the Jacobian gives every
token the product with its own block of it. See `probes/contraction.py`.
"""

import torch
from torch import Tensor

from ...kernels.residual_norm import Residual, rms_norm
from ..models.loop_schedule import Step
from ..models.tap import Half, HalfNorms, Packed, Plain


class KeysValues(Plain):
    """Keeps keys and values of one recurrence, by block, and which of them a query sees besides its own."""

    def __init__(self, batch: Packed) -> None:
        sequence_N = torch.repeat_interleave(torch.tensor(batch.lengths)).to(batch.token_id_N.device)
        place_N = torch.arange(len(sequence_N), device=sequence_N.device)
        earlier_NN = place_N.unsqueeze(1) > place_N
        self.seen_NN = earlier_NN & (sequence_N.unsqueeze(1) == sequence_N)
        self.by_block: dict[int, tuple[Tensor, Tensor]] = {}

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        self.by_block[step.block] = (k_NKC, v_NKC)
        return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)


class OthersFrozen(Plain):
    """Attends to other tokens as they were kept, in operations that can be differentiated forwards."""

    def __init__(self, kept: KeysValues) -> None:
        self.kept = kept

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        H, K = q_NHC.shape[1], k_NKC.shape[1]
        wide = torch.promote_types(q_NHC.dtype, torch.float32)
        kept = (each.to(wide) for each in self.kept.by_block[step.block])
        k_NHC, v_NHC, others_k_NHC, others_v_NHC = (
            each.to(wide).repeat_interleave(H // K, dim=1) for each in (k_NKC, v_NKC, *kept)
        )
        q_NHC_wide = q_NHC.to(wide) * scale
        others_HNN = torch.einsum("thc,shc->hts", q_NHC_wide, others_k_NHC)
        others_HNN = others_HNN.masked_fill(~self.kept.seen_NN, float("-inf"))
        own_HN1 = (q_NHC_wide * k_NHC).sum(-1).T.unsqueeze(-1)
        weight_HNX = torch.cat([others_HNN, own_HN1], dim=-1).softmax(-1)
        o_NHC = torch.einsum("hts,shc->thc", weight_HNX[..., :-1], others_v_NHC)
        return (o_NHC + weight_HNX[..., -1].T.unsqueeze(-1) * v_NHC).to(q_NHC.dtype)

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        def normed(x_ND: Tensor, weight_D: Tensor | None) -> Tensor:
            return x_ND if weight_D is None else rms_norm(x_ND, weight_D, norms.eps)

        sum_ND = normed(x_ND + normed(branch_ND, norms.branch_weight_D), norms.stream_weight_D)
        return Residual(sum_ND, normed(sum_ND, norms.next_weight_D))
