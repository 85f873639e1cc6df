"""What every operation of this folder means, in float64 and with the T×T matrix written out.

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
