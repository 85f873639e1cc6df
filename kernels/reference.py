"""The meaning of every operation of this folder, in float64 and with the T×T matrix written out.

Only tests and benchmarks import this file. It is meant to be read beside a formula, not to be run on anything
large.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_matrix(
    q_NHC: Tensor, k_NKC: Tensor, lengths: Sequence[int], scale: float | None = None
) -> list[Tensor]:
    """Causal attention probabilities of every packed sequence, float64 [H, T, T] each.

    Args:
        q_NHC: queries of the packed sequences, one after the other.
        k_NKC: keys; head h reads key head h // (H / K).
        lengths: tokens of each sequence; they add up to N.
        scale: factor on the scores, 1/√C by default.
    """
    H, C = q_NHC.shape[1:]
    factor = C**-0.5 if scale is None else scale
    matrices = []
    for q_THC, k_TKC in zip(q_NHC.split(list(lengths)), k_NKC.split(list(lengths)), strict=True):
        k_THC = k_TKC.double().repeat_interleave(H // k_TKC.shape[1], dim=1)
        scores_HTT = torch.einsum("thc,shc->hts", q_THC.double(), k_THC) * factor
        future_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool, device=q_NHC.device).triu(1)
        matrices.append(scores_HTT.masked_fill(future_TT, float("-inf")).softmax(-1))
    return matrices


def attention(
    q_NHC: Tensor,
    k_NKC: Tensor,
    v_NKC: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    sink_tokens: int = 1,
) -> dict[str, Tensor]:
    """Output `o` [N, H, C] and the statistics `entropy` (nats), `peak`, `sink`, `received`, each [N, H]."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("o", "entropy", "peak", "sink", "received")}
    v_NHC = v_NKC.double().repeat_interleave(q_NHC.shape[1] // v_NKC.shape[1], dim=1)
    for a_HTT, v_THC in zip(
        attention_matrix(q_NHC, k_NKC, lengths, scale), v_NHC.split(list(lengths)), strict=True
    ):
        parts["o"].append(torch.einsum("hts,shc->thc", a_HTT, v_THC))
        parts["entropy"].append(torch.special.entr(a_HTT).sum(-1).T)
        parts["peak"].append(a_HTT.amax(-1).T)
        parts["sink"].append(a_HTT[..., :sink_tokens].sum(-1).T)
        parts["received"].append(a_HTT.sum(-2).T)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def attention_statistics(
    q_BHTC: Tensor,
    k_BKJC: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    sink_tokens: int = 1,
) -> dict[str, Tensor]:
    """`entropy` (nats), `peak`, `sink` [B · T, H] and `received` [B · J, H] of a padded batch under any mask.

    Args:
        mask: broadcasts to [B, H, T, J]; boolean with True where a query sees a key, or added to the scores.
        is_causal: query i sees keys up to i.
    """
    H, T, C = q_BHTC.shape[1:]
    k_BHJC = k_BKJC.double().repeat_interleave(H // k_BKJC.shape[1], dim=1)
    scores_BHTJ = q_BHTC.double() @ k_BHJC.transpose(2, 3) * (C**-0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores_BHTJ = scores_BHTJ.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores_BHTJ = scores_BHTJ + mask.double()
    if is_causal:
        future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTC.device).triu(1)
        scores_BHTJ = scores_BHTJ.masked_fill(future_TT, float("-inf"))
    a_BHTJ = scores_BHTJ.softmax(-1)
    values_BHX = {
        "entropy": torch.special.entr(a_BHTJ).sum(-1),
        "peak": a_BHTJ.amax(-1),
        "sink": a_BHTJ[..., :sink_tokens].sum(-1),
        "received": a_BHTJ.sum(-2),
    }
    return {name: value.transpose(1, 2).flatten(0, 1) for name, value in values_BHX.items()}


def attention_lse(q_NHC: Tensor, k_NKC: Tensor, lengths: Sequence[int], scale: float | None = None) -> Tensor:
    """ln Σ_j exp(score_ij) over the keys that query i sees, [N, H]."""
    H, C = q_NHC.shape[1:]
    rows = []
    for q_THC, k_TKC in zip(q_NHC.split(list(lengths)), k_NKC.split(list(lengths)), strict=True):
        k_THC = k_TKC.double().repeat_interleave(H // k_TKC.shape[1], dim=1)
        scores_HTT = torch.einsum("thc,shc->hts", q_THC.double(), k_THC)
        scores_HTT *= C**-0.5 if scale is None else scale
        future_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool, device=q_NHC.device).triu(1)
        rows.append(scores_HTT.masked_fill(future_TT, float("-inf")).logsumexp(-1).T)
    return torch.cat(rows)


def attention_distance(a_SHTT: Sequence[Tensor], b_SHTT: Sequence[Tensor]) -> Tensor:
    """‖A − B‖_F of each sequence and head, [S, H], of two lists from `attention_matrix`."""
    return torch.stack(
        [(a_HTT - b_HTT).square().sum((1, 2)).sqrt() for a_HTT, b_HTT in zip(a_SHTT, b_SHTT, strict=True)]
    )


def attention_gram(a_nSHTT: Sequence[Sequence[Tensor]]) -> Tensor:
    """Σ_ij A_a A_b of all pairs of n lists from `attention_matrix`, [S, H, n, n]."""
    sequences = [torch.stack(maps).flatten(2) for maps in zip(*a_nSHTT, strict=True)]  # [n, H, T · T] each
    return torch.stack([torch.einsum("ahx,bhx->hab", a_nHX, a_nHX) for a_nHX in sequences])


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps)."""
    x_ND = x_ND.double()
    return weight_D.double() * x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)


def residual_statistics(
    residual_ND: Tensor, block_input_ND: Tensor, previous_ND: Tensor | None = None
) -> dict[str, Tensor]:
    """`norm`, `peak`, `update_norm` and, with a previous state, `step_norm` and `step_cosine`, each [N]."""
    x_ND = residual_ND.double()
    values = {
        "norm": x_ND.norm(dim=-1),
        "peak": x_ND.abs().amax(-1),
        "update_norm": (x_ND - block_input_ND.double()).norm(dim=-1),
    }
    if previous_ND is not None:
        values["step_norm"] = (x_ND - previous_ND.double()).norm(dim=-1)
        values["step_cosine"] = torch.cosine_similarity(x_ND, previous_ND.double(), dim=-1, eps=0.0)
    return values


def residual_similarity(x_nND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean cosine over each sequence's tokens of every pair of n residuals, [S, n, n]."""
    x_nND = x_nND.double()
    cosine_nnN = torch.cosine_similarity(x_nND.unsqueeze(0), x_nND.unsqueeze(1), dim=-1, eps=0.0)
    return torch.stack([part_nnT.mean(-1) for part_nnT in cosine_nnN.split(list(lengths), -1)])


def residual_entropy(x_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Entropy in nats of the squared singular values of each sequence's residuals, over their sum, [S]."""
    shares = [
        torch.linalg.svdvals(x_TD).square() / x_TD.square().sum()
        for x_TD in x_ND.double().split(list(lengths))
    ]
    return torch.stack([torch.special.entr(share).sum() for share in shares])


def lens(
    head_input_ND: Tensor, last_ND: Tensor, head_VD: Tensor, logit_scale: float = 1.0
) -> dict[str, Tensor]:
    """`kl` of one state's next-token distribution from the last one's, its `entropy`, both in nats, and its
    likeliest `token`; [N] each, with all logits written out.
    """
    log_p_NV, log_q_NV = (
        (x_ND.double() @ head_VD.double().T * logit_scale).log_softmax(-1)
        for x_ND in (head_input_ND, last_ND)
    )
    p_NV = log_p_NV.exp()
    return {
        "kl": (p_NV * (log_p_NV - log_q_NV)).sum(-1),
        "entropy": -(p_NV * log_p_NV).sum(-1),
        "token": p_NV.argmax(-1),
    }
