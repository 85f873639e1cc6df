"""The logit lens: the next-token distribution that a state holds, and its distance from a later state's.

Logits exist for a few thousand tokens of the vocabulary at a time and never for all of it. Sums over
them are carried along and rescaled whenever a larger logit turns up, as flash attention does along its keys.
Let z be a state's logits, x their difference to the last state's, m the largest so far and e = exp(z − m):

    W = Σe    entropy = ln W − Σ e (z − m) / W    KL = Σ e x / W + ln (Σ e exp(−x) / W)

Near the end of a converging loop x vanishes, and with ln(1 + Σ e expm1(−x) / W) the divergence keeps its
digits far below float32's rounding of the logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY_AT_ONCE = 2048  # on two cores 512 tokens' logits of so many stay in the cache; larger is slower
SMALL = 0.5  # largest |x| for which the expm1 form is taken; above, its sums may overflow


class LensStatistics(NamedTuple):
    """Statistics of R states of N tokens each."""

    kl_RN: Tensor  # float32, KL(p ‖ p_last), nats
    entropy_RN: Tensor  # float32, nats
    token_RN: Tensor  # int32, the likeliest token; the first of equal ones, -1 where logits are undefined


def lens(
    head_input_RND: Sequence[Tensor], last_ND: Tensor, head_VD: Tensor, logit_scale: float = 1.0
) -> LensStatistics:
    """Reads states through a head, in float32 whatever their dtype.

    Args:
        head_input_RND: R tensors [N, D], as the head reads them (after the final norm).
        last_ND: the state whose distribution the others are compared with, as the head reads it.
        head_VD: the head's weights. logit_scale: factor on the logits.
    """
    folds = [_Fold(last_ND) for _ in head_input_RND]
    total = _Total(last_ND)
    for start in range(0, len(head_VD), VOCABULARY_AT_ONCE):
        weight_CD = head_VD[start : start + VOCABULARY_AT_ONCE].float()
        last_NC = F.linear(last_ND.float(), weight_CD).mul_(logit_scale)
        total.add(last_NC)
        for head_input_ND, fold in zip(head_input_RND, folds, strict=True):
            is_last = head_input_ND is last_ND
            z_NC = (
                last_NC.clone() if is_last else F.linear(head_input_ND.float(), weight_CD).mul_(logit_scale)
            )
            fold.add(z_NC, last_NC, start)
    kl, entropy, token = zip(*(fold.result(total.log()) for fold in folds), strict=True)
    return LensStatistics(torch.stack(kl), torch.stack(entropy), torch.stack(token))


class _Total:
    """ln Σ exp(z) over the vocabulary seen so far."""

    def __init__(self, state_ND: Tensor) -> None:
        self.top = torch.full(state_ND.shape[:1], float("-inf"), device=state_ND.device)
        self.weight = torch.zeros_like(self.top)

    def add(self, z_NC: Tensor) -> None:
        top = torch.maximum(self.top, z_NC.amax(-1))
        self.weight = self.weight * (self.top - top).exp() + (z_NC - top.unsqueeze(-1)).exp_().sum(-1)
        self.top = top

    def log(self) -> Tensor:
        return self.top + self.weight.log()


class _Fold:
    """Sums over the vocabulary seen so far, of one state."""

    def __init__(self, state_ND: Tensor) -> None:
        self.top = torch.full(state_ND.shape[:1], float("-inf"), device=state_ND.device)
        self.token = torch.full_like(self.top, -1, dtype=torch.int32)
        self.weight = self.centred = self.shift = self.small = torch.zeros_like(self.top)
        self.largest_shift = torch.zeros_like(self.top)

    def add(self, z_NC: Tensor, last_NC: Tensor, start: int) -> None:
        """Takes in the logits of tokens from `start` on; writes over z."""
        top, index = z_NC.max(-1)
        self.token = torch.where(top > self.top, (index + start).int(), self.token)
        top = torch.maximum(self.top, top)
        shrink = (self.top - top).exp()  # 0 at the first chunk, where the sums are 0 as well
        x_NC = z_NC - last_NC
        centred_NC = z_NC.sub_(top.unsqueeze(-1))
        e_NC = centred_NC.exp()
        moved = torch.where(self.weight > 0, (self.top - top) * self.weight, 0.0)
        self.centred = (self.centred + moved) * shrink + centred_NC.mul_(e_NC).sum(-1)
        self.weight = self.weight * shrink + e_NC.sum(-1)
        self.largest_shift = torch.maximum(self.largest_shift, x_NC.abs().amax(-1))
        self.shift = self.shift * shrink + (e_NC * x_NC).sum(-1)
        self.small = self.small * shrink + x_NC.neg_().expm1_().mul_(e_NC).sum(-1)
        self.top = top

    def result(self, log_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns KL divergence, entropy and token, [N] each."""
        log_weight = self.weight.log()
        log_ratio = torch.where(
            self.largest_shift <= SMALL,
            torch.log1p(self.small / self.weight),
            log_last - self.top - log_weight,
        )
        kl = self.shift / self.weight + log_ratio
        entropy = log_weight - self.centred / self.weight
        token = torch.where(entropy.isnan(), -1, self.token)
        return kl.clamp_min(0), entropy.clamp_min(0), token
