"""One short prompt, everything about it: full attention maps, the loop's trajectory, and the logit lens.

This is the one place that writes T×T attention down, and only within a stated bound of memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.residual_norm import rms_norm
from .data import open_tokenizer
from .models.description import Description, Step
from .models.initial_state import draw_initial_state
from .models.load import ModelSource, find_model
from .models.model import LoopedModel
from .models.tap import Packed
from .plan import PlanError, resolve_device
from .settings import InspectSettings
from .tap import Buffers, Statistics

LENS_TOKENS = 3  # how many of the likeliest next tokens are shown


@dataclass(frozen=True)
class LensRow:
    """The last token of the prompt after one recurrence; of a feedforward model, after all of it."""

    recurrence: int | None
    relative_step: float | None
    """‖x_t − x_{t−1}‖ / ‖x_t‖ of the last core layer."""
    relative_gap: float | None
    """‖x_t − x_last‖ / ‖x_last‖ of the last core layer."""
    entropy: float
    """Of attention rows, nats, mean over the heads of the core."""
    lens: list[tuple[str, float]]
    """Likeliest next tokens and their probability, read through the model's own final norm and head."""


@dataclass(frozen=True)
class Inspection:
    """All of one prompt, on the CPU."""

    plan: dict[str, Any]
    """`model` as in a store's plan."""
    description: Description
    prompt: str
    tokens: list[str]
    attention: Tensor
    """Float32 [depth, H, T, T]."""
    state: Tensor
    """Float32 [depth, T, D], the residual after every block."""
    values: dict[str, Tensor]
    """Statistics by quantity, [depth, T] or [depth, T, H]."""
    lens: list[list[tuple[str, float]]]
    """For the last token, by recurrence."""

    def rows(self) -> Iterator[LensRow]:
        """The last token's way, a row a recurrence."""
        d = self.description
        entropy_D = self.values["attention_entropy"][:, -1].mean(-1)
        if not d.core:
            yield LensRow(None, None, None, float(entropy_D.mean()), self.lens[0])
            return
        norm_D = self.values["residual_norm"][:, -1]
        last_depth = d.prelude + d.core * d.recurrences - 1
        for recurrence in range(d.recurrences):
            first = d.prelude + recurrence * d.core
            depth = first + d.core - 1
            step = self.values["step_norm"][depth, -1] / norm_D[depth]
            gap = self.values["gap_norm"][depth, -1] / norm_D[last_depth]
            yield LensRow(
                recurrence,
                float(step) if recurrence else None,
                float(gap),
                float(entropy_D[first : depth + 1].mean()),
                self.lens[recurrence],
            )


def inspect_prompt(settings: InspectSettings) -> Inspection:
    """Runs one prompt.

    Raises:
        ModelError, DataError: as for a capture.
        PlanError: an empty or too long prompt, or maps over `map_memory_gib`.
    """
    source = find_model(settings.model, settings.loop, settings.recurrences)
    tokenizer_path = source.origin.tokenizer_path
    if tokenizer_path is None and not settings.model.startswith("random:"):
        raise PlanError(f"{settings.model} has no tokenizer.json, so it cannot read a prompt")
    tokenizer = open_tokenizer(tokenizer_path)
    ids = tokenizer.encode(settings.prompt)
    _check(settings, source, ids)
    model = source.load(resolve_device(settings.device), settings.dtype)
    return _run(settings, source, model, ids, [tokenizer.decode([i]) for i in ids], tokenizer.decode)


class _Maps(Statistics):
    """Statistics, and the attention matrices and loop states besides."""

    def __init__(self, description: Description, buffers: Buffers, attention: Tensor) -> None:
        super().__init__(description, buffers, state_depths=range(description.depth))
        self.loop_states: list[Tensor] = []
        self._matrices = attention

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        k_NHC = k_NKC.repeat_interleave(q_NHC.shape[1] // k_NKC.shape[1], dim=1)
        scores_HTT = torch.einsum("thc,shc->hts", q_NHC.float(), k_NHC.float()) * scale
        future_TT = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
        self._matrices[step.depth] = scores_HTT.masked_fill(future_TT, float("-inf")).softmax(-1)
        return super().attention(step, q_NHC, k_NKC, v_NKC, lengths, scale)

    def loop_state(self, recurrence: int, state_ND: Tensor) -> None:
        self.loop_states.append(state_ND[-1:])


@torch.inference_mode()
def _run(
    settings: InspectSettings,
    source: ModelSource,
    model: LoopedModel,
    ids: list[int],
    tokens: list[str],
    decode,
) -> Inspection:
    d, T = source.description, len(ids)
    names = ("residual_norm", "step_norm", "gap_norm", "attention_entropy")
    values = {
        name: torch.full(
            (d.depth, T, d.num_heads) if "attention" in name else (d.depth, T),
            float("nan"),
            device=model.device,
        )
        for name in names
    }
    state = torch.empty(d.depth, T, d.width, dtype=model.dtype, device=model.device)
    attention = torch.empty(d.depth, d.num_heads, T, T, device=model.device)
    tap = _Maps(d, Buffers(values, state, torch.arange(T, device=model.device)), attention)
    batch = Packed(torch.tensor(ids, device=model.device), (T,))
    initial_ND = None
    if d.initial_state == "normal":
        initial_ND = draw_initial_state(settings.seed, [0], [T], d.width, d.initial_std).to(model.device)
    head_input_ND = model(batch, tap, initial_ND)
    read = [_to_head(model, state_ND) for state_ND in tap.loop_states] or [head_input_ND[-1:]]
    return Inspection(
        plan={"model": source.identity()},
        description=d,
        prompt=settings.prompt,
        tokens=tokens,
        attention=attention.cpu(),
        state=state.float().cpu(),
        values={name: value.cpu() for name, value in values.items()},
        lens=[_likeliest(model.logits(state_ND), decode) for state_ND in read],
    )


def _to_head(model: LoopedModel, state_ND: Tensor) -> Tensor:
    """A loop state as the head would read it: through the final norm, unless that ended the recurrence."""
    if model.description.recurrence_end == "norm":
        return state_ND
    return rms_norm(state_ND, model.final_norm, model.description.block.eps)


def _likeliest(logits_NV: Tensor, decode) -> list[tuple[str, float]]:
    probability_V = logits_NV[-1].float().softmax(-1)
    share, token = probability_V.topk(LENS_TOKENS)
    return [(decode([int(t)]), float(p)) for t, p in zip(token, share, strict=True)]


def _check(settings: InspectSettings, source: ModelSource, ids: list[int]) -> None:
    d, T = source.description, len(ids)
    if not T:
        raise PlanError("the prompt has no tokens; give some text with --prompt")
    if d.max_positions < T:
        raise PlanError(f"the prompt has {T} tokens and the model takes at most {d.max_positions}")
    maps_gib = d.depth * d.num_heads * T * T * 4 / 2**30
    if maps_gib > settings.map_memory_gib:
        fits = int((settings.map_memory_gib * 2**30 / (4 * d.depth * d.num_heads)) ** 0.5)
        raise PlanError(
            f"{d.depth} attention maps of {T} tokens take {maps_gib:.2f} GiB and the bound is "
            f"{settings.map_memory_gib:g}; {fits} tokens fit, or raise --map-memory-gib"
        )
