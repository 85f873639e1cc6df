"""Similarity of the residuals of all block invocations, and entropy of one sequence's residuals.

Both are plain PyTorch on any device: one matrix product each, over pieces of tokens or of channels so that
copies in float32 or float64 stay small.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 32 * 2**20  # one copy in the precision of the sums


def residual_similarity(x_nND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Cosine of the residuals of each pair of n block invocations, mean over a sequence's tokens.

    Args:
        x_nND: residuals of packed sequences, stacked. lengths: tokens of each, adding up to N.
    Returns:
        float32 [S, n, n]; NaN where a residual is all zeros, and for a sequence without tokens.
    """
    n, _, D = x_nND.shape
    sums_Snn = torch.zeros(len(lengths), n, n, dtype=torch.float64, device=x_nND.device)
    tokens = max(1, PIECE_BYTES // (4 * n * max(n, D)))
    for x_nTD, sum_nn in zip(x_nND.split(list(lengths), 1), sums_Snn, strict=True):
        for piece_nTD in x_nTD.split(tokens, 1) if x_nTD.shape[1] else ():
            unit_TnD = piece_nTD.transpose(0, 1).float()
            unit_TnD = unit_TnD / unit_TnD.abs().amax(-1, keepdim=True)  # or squares of large ones overflow
            unit_TnD = unit_TnD / torch.linalg.vector_norm(unit_TnD, dim=-1, keepdim=True)
            # a product per token: one sum over all tokens' channels would round near 1 in the sixth digit
            sum_nn += (unit_TnD @ unit_TnD.mT).sum(0, dtype=torch.float64)
    num_tokens_S = torch.tensor(lengths, dtype=torch.float64, device=x_nND.device)
    return (sums_Snn / num_tokens_S[:, None, None]).float()


def residual_entropy(x_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """Matrix-based entropy of each sequence's residuals: −Σ λ ln λ of their Gram matrix over its trace, nats.

    It is 0 where all tokens have one direction, ln T where T tokens are orthogonal and of one length. X Xᵀ
    and Xᵀ X have the same nonzero eigenvalues, so the smaller is taken: memory is min(T, D)² numbers.

    Args:
        x_ND: residuals of packed sequences. lengths: tokens of each, adding up to N.
    Returns:
        float32 [S]; NaN where a residual is not finite or all of them are 0, and where there are no tokens.
    Source: arXiv 2502.02013.
    """
    entropies = [_entropy(x_TD) for x_TD in x_ND.split(list(lengths))]
    return torch.stack(entropies).float() if entropies else x_ND.new_empty(0, dtype=torch.float32)


def _entropy(x_TD: Tensor) -> Tensor:
    long_XY = x_TD if x_TD.shape[0] >= x_TD.shape[1] else x_TD.T  # Y is the smaller side
    Y = long_XY.shape[1]
    gram_YY = torch.zeros(Y, Y, dtype=torch.float64, device=x_TD.device)
    if not Y:
        return gram_YY.new_full((), float("nan"))
    for piece_XY in long_XY.split(max(1, PIECE_BYTES // (8 * Y))):
        piece_XY = piece_XY.double()
        gram_YY += piece_XY.mT @ piece_XY
    gram_YY /= gram_YY.trace()
    # the solver refuses what is not finite; the trace carries it to the result
    share_Y = torch.linalg.eigvalsh(gram_YY.nan_to_num(0.0, 0.0, 0.0)).clamp_min(0)
    return torch.special.entr(share_Y).sum() + 0 * gram_YY.trace()
