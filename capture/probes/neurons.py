"""Prediction and suppression neurons, told from a model's weights alone.

What a neuron of an MLP writes is its activation times a fixed vector w, a column of the MLP's output matrix.
Read through the unembedding U, w raises some logits and lowers others: U w, its logit effect. A prediction
neuron's effect over the vocabulary has heavy tails and leans to the positive side, so that it raises a few
tokens; a suppression neuron's has heavy tails and leans to the negative side.

The reading is that of the logit lens: what the block leaves in the residual, through the model's final norm
and head, as if nothing came after it. Folded into w are the gains of the norms that the block itself puts on
what its MLP writes: on the branch (Ouro, OLMo-2) and on the stream after the add (Huginn); into U the gain of
the final norm, once, wherever the block stands. Skewness and kurtosis do not change when an effect is scaled
or shifted, so everything that is one number drops out: how large the norms' divisors are, the logit scale,
the mean over the vocabulary. All norms are RMS norms here; a LayerNorm would subtract a mean from w as well.
Left out is what comes after the block and reads or turns w: later blocks, norms on the stream, an adapter.

In a gated MLP, as all of these are, the activation takes either sign, and a model whose row of `up` and w
are both negated is the same function. There the share of heavy tails, prediction and suppression together,
is a property of the function; which of the two a neuron counts as is one of how its weights are written.

Source: Gurnee et al., Universal Neurons in GPT2 Language Models, arXiv 2401.12181, section 5, whose released
code draws the line at a kurtosis of 10 (a normal distribution's is 3), of cosines of w with the rows of U;
by layer, and of U w, in Lad et al., The Remarkable Robustness of LLMs, arXiv 2406.19384, section 5.3, which
states no threshold. What the appendix of arXiv 2604.11791 takes was not at hand: that the line is at 10 for
U w too is our choice. Cosines put more neurons past it (in SmolLM2-135M's last layer 21 % against 12 %);
`logit_moments` gives the moments of either, for any other line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.model import LoopedModel, TransformerBlock

KURTOSIS = 10.0
QUANTILES = (0.5, 0.9, 0.99, 1.0)
# tokens and neurons of one tile of logits: on a CPU what a core's cache holds (1 MiB), 256 MiB on a GPU
_TILES = {"cpu": (1024, 256), "cuda": (8192, 8192)}


@dataclass(frozen=True)
class Moments:
    """Moments of one block's neurons' logit effects; float64 [I] each, NaN where an effect is constant."""

    stage: str
    layer: int
    """Place of the block inside its stage."""
    skewness_I: Tensor
    """E z³ over the vocabulary of the standardised effect z."""
    kurtosis_I: Tensor
    """E z⁴, which is 3 for a normal distribution; the excess is what is above that."""


@torch.inference_mode()
def logit_moments(model: LoopedModel, *, cosines: bool = False) -> list[Moments]:
    """Skewness and kurtosis of every neuron's logit effect, block by block in the order they first run.

    Multiplies in float32 and adds up in float64, a tile of logits at a time: besides the model it takes some
    MiB on a CPU. Every pair of a token and a neuron costs 2 D operations, as in one pass of the head over as
    many tokens as the model has neurons.

    Args:
        cosines: takes cosines of w with every row of U, which is the effect with all rows at one length.
    """
    mean_D, scale = _centre(model, cosines)
    blocks: list[TransformerBlock] = list(model.blocks)  # pyright: ignore[reportAssignmentType]
    writes = [_unit_columns(block) for block in blocks]
    num_neurons = _TILES[model.device.type][1]
    sums_L3I = torch.zeros(
        len(blocks), 3, model.description.mlp_width, dtype=torch.float64, device=model.device
    )
    for rows_BD in _unembedding(model, cosines):
        u_BD = ((rows_BD - mean_D) * scale).float()  # centred, so that powers do not cancel
        for block, (gain_D1, length_I), sums_3I in zip(blocks, writes, sums_L3I, strict=True):
            for start in range(0, len(length_I), num_neurons):
                some = slice(start, start + num_neurons)
                w_DI = block.mlp_out[:, some].float() * gain_D1 / length_I[some]
                sums_3I[:, some] += _power_sums(w_DI.T @ u_BD.T)
    mean_L3I = sums_L3I / len(model.head_weight)
    variance_LI, third_LI, fourth_LI = mean_L3I.unbind(1)
    skewness_LI, kurtosis_LI = third_LI / variance_LI**1.5, fourth_LI / variance_LI**2
    return [
        Moments(stage, layer, skewness_I, kurtosis_I)
        for (stage, layer), skewness_I, kurtosis_I in zip(
            _places(model), skewness_LI.cpu(), kurtosis_LI.cpu(), strict=True
        )
    ]


def summarise(moments: Sequence[Moments], threshold: float = KURTOSIS) -> dict[str, Any]:
    """Returns what a plan records, as JSON: by block the shares of neurons, and quantiles of their kurtosis.

    A neuron whose effect is constant, such as one that writes nothing, counts as neither kind.
    """
    blocks = []
    for each in moments:
        is_heavy_I = each.kurtosis_I > threshold
        finite_I = each.kurtosis_I[each.kurtosis_I.isfinite()]
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        kurtosis = finite_I.quantile(levels).tolist() if len(finite_I) else [None] * len(QUANTILES)
        blocks.append(
            {
                "stage": each.stage,
                "layer": each.layer,
                "num_neurons": len(each.kurtosis_I),
                "prediction": (is_heavy_I & (each.skewness_I > 0)).double().mean().item(),
                "suppression": (is_heavy_I & (each.skewness_I < 0)).double().mean().item(),
                "kurtosis": kurtosis,
            }
        )
    return {"threshold": threshold, "quantiles": list(QUANTILES), "blocks": blocks}


def _unembedding(model: LoopedModel, cosines: bool) -> Iterator[Tensor]:
    """Rows of the head with the final norm's gain, some tokens at a time, float64 [B, D]."""
    num_tokens, _ = _TILES[model.device.type]
    for rows_BD in model.head_weight.split(num_tokens):
        u_BD = rows_BD.double() * model.final_norm.double()
        yield u_BD / u_BD.norm(dim=1, keepdim=True).clamp_min(1e-300) if cosines else u_BD


def _centre(model: LoopedModel, cosines: bool) -> tuple[Tensor, float]:
    """The mean row of the unembedding, float64 [D], and what makes its numbers of order one."""
    total_D, square = torch.zeros_like(model.final_norm, dtype=torch.float64), 0.0
    for u_BD in _unembedding(model, cosines):
        total_D += u_BD.sum(0)
        square += u_BD.square().sum().item()
    scale = (model.head_weight.numel() / square) ** 0.5 if square else 1.0
    return total_D / len(model.head_weight), scale


def _unit_columns(block: TransformerBlock) -> tuple[Tensor, Tensor]:
    """The gains on what the MLP writes, [D, 1], and the length of every column with them, [I]; float32."""
    gain_D = torch.ones(len(block.mlp_out), dtype=torch.float32, device=block.mlp_out.device)
    for norm_D in (block.mlp_branch_output_norm, block.mlp_stream_norm):
        if norm_D is not None:
            gain_D = gain_D * norm_D.float()
    return gain_D[:, None], (block.mlp_out.float() * gain_D[:, None]).norm(dim=0)


def _power_sums(y_IB: Tensor) -> Tensor:
    """Sums of squares, cubes and fourth powers over the tokens of a tile, [3, I]."""
    square_IB = y_IB * y_IB
    return torch.stack([square_IB.sum(1), (square_IB * y_IB).sum(1), square_IB.square_().sum(1)])


def _places(model: LoopedModel) -> list[tuple[str, int]]:
    """Stage and layer of every block, in the order of `model.blocks`."""
    places = {step.block: (step.stage, step.layer) for step in model.description.steps()}
    return [places[block] for block in range(len(model.blocks))]
