"""What the kernels measure, as a user of plain PyTorch would: with the T×T matrix, one operation after the
other. Sequences all have one length here, so that they are a batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_with_weights(
    q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [N, H, C] and weights [B, H, T, T] in q's dtype; softmax in float32, as transformers' eager."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_NHC, k_NKC, v_NKC))
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    future_TT = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(future_TT, float("-inf"))
    a_BHTT = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (a_BHTT @ v).transpose(1, 2).flatten(0, 1), a_BHTT


def attention_statistics(a_BHTT: Tensor) -> tuple[Tensor, ...]:
    """Entropy, peak, sink and received of weights, float32 [N, H] each."""
    a_BHTT = a_BHTT.float()
    values_BHT = (torch.special.entr(a_BHTT).sum(-1), a_BHTT.amax(-1), a_BHTT[..., 0], a_BHTT.sum(-2))
    return tuple(x.transpose(1, 2).flatten(0, 1) for x in values_BHT)


def attention_distance(a_RBHTT: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Column sums [R, N, H] of R invocations' weights, and |A_r − A_{r−1}| [R − 1, B, H]."""
    received = torch.stack([a.float().sum(-2).transpose(1, 2).flatten(0, 1) for a in a_RBHTT])
    pairs = zip(a_RBHTT[1:], a_RBHTT[:-1], strict=True)
    return received, torch.stack([torch.linalg.vector_norm((a - b).float(), dim=(2, 3)) for a, b in pairs])


def attention_gram(a_nBHTT: Tensor) -> Tensor:
    """Inner products of all pairs of n invocations' weights, [B, H, n, n] in their dtype."""
    a_BHnX = a_nBHTT.flatten(3).permute(1, 2, 0, 3)
    return a_BHnX @ a_BHnX.transpose(2, 3)


def residual_norm(x_ND: Tensor, branch_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and it normed for the next branch."""
    residual_ND = x_ND + branch_ND
    return residual_ND, F.rms_norm(residual_ND, weight_D.shape, weight_D, eps)


def residual_norm_statistics(
    x_ND: Tensor, branch_ND: Tensor, weight_D: Tensor, eps: float, block_input_ND: Tensor, previous_ND: Tensor
) -> tuple[Tensor, ...]:
    """The same, and norm, peak, update_norm, step_norm and step_cosine of the sum, float32 [N] each."""
    residual_ND, y_ND = residual_norm(x_ND, branch_ND, weight_D, eps)
    x, block_input, previous = residual_ND.float(), block_input_ND.float(), previous_ND.float()
    return (
        residual_ND,
        y_ND,
        x.norm(dim=-1),
        x.abs().amax(-1),
        (x - block_input).norm(dim=-1),
        (x - previous).norm(dim=-1),
        F.cosine_similarity(x, previous, dim=-1),
    )
