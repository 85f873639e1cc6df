"""The general looped model: any description, one forward pass over packed sequences.

Unusual in it: no padding and no batch axis (sequences stand one after the other along N); attention and the
residual add run through a tap; the norm before a branch is applied by the add before it, because a fused
kernel does both in one pass; queries, keys and values are one matrix, gate and up another.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.residual_norm import rms_norm
from .description import NORMS, Block, Description, Rotary
from .loop_schedule import Step
from .tap import HalfNorms, Packed, Plain

PLAIN = Plain()


class ForwardPass(NamedTuple):
    """Values that stay the same from the first block of a forward pass to the last."""

    batch: Packed
    rotation: tuple[Tensor, Tensor]  # `rotary_table` of the batch's positions
    tap: Plain


class TransformerBlock(nn.Module):
    """One block; norms that the placement does not have are None."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        d = description
        placement = NORMS[d.block.norm]
        self.kind: Block = d.block
        self.heads = (d.num_heads, d.num_kv_heads)
        self.head_width = d.head_width
        qkv_width = (d.num_heads + 2 * d.num_kv_heads) * d.head_width
        self.qkv = _matrix(qkv_width, d.width)
        self.attention_out = _matrix(d.width, d.num_heads * d.head_width)
        self.gate_up = _matrix(2 * d.mlp_width, d.width)  # gate rows first
        self.mlp_out = _matrix(d.width, d.mlp_width)
        self.attention_branch_input_norm = _vector(d.width, placement.branch_input)
        self.attention_branch_output_norm = _vector(d.width, placement.branch_output)
        self.attention_stream_norm = _vector(d.width, placement.stream)
        self.mlp_branch_input_norm = _vector(d.width, placement.branch_input)
        self.mlp_branch_output_norm = _vector(d.width, placement.branch_output)
        self.mlp_stream_norm = _vector(d.width, placement.stream)
        q_heads, k_heads = self.heads if d.block.qk_norm == "all_heads" else (1, 1)
        self.q_norm = _vector(q_heads * d.head_width, d.block.qk_norm is not None)
        self.k_norm = _vector(k_heads * d.head_width, d.block.qk_norm is not None)
        biased_width = qkv_width if d.block.bias == "qkv" else qkv_width - d.num_kv_heads * d.head_width
        self.bias = _vector(biased_width, d.block.bias is not None)

    def forward(
        self,
        step: Step,
        x_ND: Tensor,
        y_ND: Tensor,
        next_weight_D: Tensor | None,
        run: ForwardPass,
    ) -> tuple[Tensor, Tensor]:
        """Runs the block on the stream x and its normed copy y; returns both for the next block."""
        eps, tap = self.kind.eps, run.tap
        q_NHC, k_NKC, v_NKC = self._queries_keys_values(y_ND, run.rotation)
        o_NHC = tap.attention(step, q_NHC, k_NKC, v_NKC, run.batch, self.head_width**-0.5)
        norms = HalfNorms(
            eps, self.attention_branch_output_norm, self.attention_stream_norm, self.mlp_branch_input_norm
        )
        attended_ND = F.linear(o_NHC.flatten(1), self.attention_out)
        x_ND, y_ND = tap.residual(step, "attention", x_ND, attended_ND, norms)
        gate_NI, up_NI = F.linear(y_ND, self.gate_up).chunk(2, dim=-1)
        branch_ND = F.linear(F.silu(gate_NI) * up_NI, self.mlp_out)
        norms = HalfNorms(eps, self.mlp_branch_output_norm, self.mlp_stream_norm, next_weight_D)
        return tap.residual(step, "mlp", x_ND, branch_ND, norms)

    def _queries_keys_values(
        self, y_ND: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        H, K = self.heads
        C = self.head_width
        qkv_NX = F.linear(y_ND, self.qkv)
        if self.bias is not None:
            qkv_NX[:, : len(self.bias)] += self.bias
        qk_NX, v_NX = qkv_NX.split([(H + K) * C, K * C], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q_NX, k_NX = qk_NX.split([H * C, K * C], dim=-1)
            norms = ((q_NX, self.q_norm), (k_NX, self.k_norm))
            qk_NX = torch.cat([self._normed(x_NX, weight) for x_NX, weight in norms], dim=-1)
        qk_NXC = rotate(qk_NX.unflatten(-1, (H + K, C)), rotation, self.kind.rotary.interleaved)
        return qk_NXC[:, :H], qk_NXC[:, H:], v_NX.unflatten(-1, (K, C))

    def _normed(self, x_NX: Tensor, weight: Tensor) -> Tensor:
        """Applies an RMS norm over as many channels as there are weights: over all heads, or over each."""
        return rms_norm(x_NX.unflatten(-1, (-1, len(weight))), weight, self.kind.eps).flatten(-2)


class LoopedModel(nn.Module):
    """A looped model, made of a description and weights; inference only."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = d = description
        self.embedding = _matrix(d.vocab_size, d.width)
        self.blocks = nn.ModuleList(TransformerBlock(d) for _ in range(d.num_blocks))
        is_looped = [visit[0].recurrence >= 0 for visit in d.visits]
        first = is_looped.index(True) if d.loops else len(is_looped)
        end = len(is_looped) - is_looped[::-1].index(True) if d.loops else first
        self._before, self._looped, self._after = d.visits[:first], d.visits[first:end], d.visits[end:]
        self.adapter = _matrix(d.width, 2 * d.width) if d.injection == "linear" else None
        self.final_norm = nn.Parameter(torch.empty(d.width), requires_grad=False)
        self.head = None if d.tied_head else _matrix(d.vocab_size, d.width)
        self.exit_gate_weight = _matrix(1, d.width) if d.exit_gate else None
        self.exit_gate_bias = _vector(1, d.exit_gate)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, [V, D]: the embedding's where they are tied."""
        return self.embedding if self.head is None else self.head

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(self, batch: Packed, tap: Plain = PLAIN, initial_state_ND: Tensor | None = None) -> Tensor:
        """Runs every step; returns what the head reads, [N, D].

        Args:
            batch: packed token ids, on the model's device.
            tap: runs attention and residual adds.
            initial_state_ND: state entering the first recurrence; models that draw one need it, others start
                from the prelude's output without it.
        """
        d, run = self.description, self.begin(batch, tap)
        x_ND = self.run_prelude(run)
        assert d.initial_state == "prelude" or initial_state_ND is not None, (
            "this model's loop starts from a drawn state"
        )
        state_ND = x_ND if initial_state_ND is None else initial_state_ND.to(x_ND)
        for steps in self._looped:
            state_ND = self.recur(steps, state_ND, x_ND, run)
            if steps[-1].recurrence >= 0:  # a phase between two loops leaves no loop state
                tap.loop_state(steps[-1], state_ND)
        if d.norm_before_coda:
            state_ND = rms_norm(state_ND, self.final_norm, d.block.eps)
        for steps in self._after:
            state_ND = self._run(steps, state_ND, run)
        return rms_norm(state_ND, self.final_norm, d.block.eps) if d.closes_with_norm else state_ND

    def begin(self, batch: Packed, tap: Plain) -> ForwardPass:
        """Returns what `run_prelude` and `recur` are given."""
        d = self.description
        return ForwardPass(batch, rotary_table(d.block.rotary, d.head_width, batch.position_N), tap)

    def run_prelude(self, run: ForwardPass) -> Tensor:
        """Runs the prelude; returns what the loop gets of it, [N, D]."""
        x_ND = F.embedding(run.batch.token_id_N, self.embedding)
        if self.description.embedding_scale != 1:
            x_ND = x_ND * self.description.embedding_scale
        for steps in self._before:
            x_ND = self._run(steps, x_ND, run)
        return run.tap.prelude(x_ND)

    def recur(self, steps: Sequence[Step], state_ND: Tensor, prelude_ND: Tensor, run: ForwardPass) -> Tensor:
        """Runs one recurrence: from the state that enters it to the one that enters the next, [N, D].

        Args:
            steps: its address, one of the description's visits.
            prelude_ND: what the prelude left, for models with injection.
        """
        if self.adapter is not None:
            state_ND = F.linear(torch.cat([state_ND, prelude_ND], dim=-1), self.adapter)
        state_ND = self._run(steps, state_ND, run)
        if self.description.recurrence_end == "norm":
            state_ND = rms_norm(state_ND, self.final_norm, self.description.block.eps)
        return state_ND

    def read_out(self, loop_state_ND: Tensor) -> Tensor:
        """Returns a loop state as the head reads it: through the final norm, unless that ended the pass."""
        if self.description.recurrence_end == "norm":
            return loop_state_ND
        return rms_norm(loop_state_ND, self.final_norm, self.description.block.eps)

    def logits(self, head_input_ND: Tensor) -> Tensor:
        """Returns logits [N, V] in the model's dtype."""
        logits_NV = F.linear(head_input_ND, self.head_weight)
        return logits_NV if self.description.logit_scale == 1 else logits_NV * self.description.logit_scale

    def exit_gate_logits(self, loop_state_ND: Tensor) -> Tensor:
        """Returns the exit gate's logits, [N] in the model's dtype, as `exit_probability` takes them."""
        assert self.exit_gate_weight is not None, "this model has no exit gate"
        return F.linear(loop_state_ND, self.exit_gate_weight, self.exit_gate_bias).squeeze(-1)

    def _run(self, steps: Sequence[Step], x_ND: Tensor, run: ForwardPass) -> Tensor:
        """Runs a phase's blocks once, each of which leaves the next one's normed input behind."""
        every: list[TransformerBlock] = list(self.blocks)  # pyright: ignore[reportAssignmentType]
        blocks = [every[step.block] for step in steps]
        weights = [block.attention_branch_input_norm for block in blocks]
        y_ND = x_ND if weights[0] is None else rms_norm(x_ND, weights[0], self.description.block.eps)
        following = [after for _, after in pairwise(weights)] + [None]
        for step, block, next_weight_D in zip(steps, blocks, following, strict=True):
            x_ND, y_ND = block(step, x_ND, y_ND, next_weight_D, run)
        return x_ND


def rotary_table(rotary: Rotary, head_width: int, position_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, C/2] of every token's angles, float32."""
    angle = position_N.float().outer(rotary_frequencies(rotary, head_width, position_N.device)).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotary_frequencies(rotary: Rotary, head_width: int, device: torch.device) -> Tensor:
    """Angle that each pair of channels turns by from one position to the next, float32 [C/2]."""
    exponent = torch.arange(0, head_width, 2, device=device).float() / head_width
    frequency = 1.0 / rotary.theta**exponent
    if (scaling := rotary.scaling) is not None:
        turns = scaling.original_max_positions * frequency / (2 * torch.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        frequency = frequency * (smooth + (1 - smooth) / scaling.factor)
    return frequency


def rotate(x_NHC: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Turns pairs of channels by their position's angle, in float32 whatever the dtype."""
    cos, sin = rotation
    if interleaved:
        a, b = x_NHC.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x_NHC.dtype)
    a, b = x_NHC.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_NHC.dtype)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns), requires_grad=False)


def _vector(size: int, there: bool) -> nn.Parameter | None:
    """Returns a parameter for a norm's weight or a bias, or None where there is none."""
    return nn.Parameter(torch.empty(size), requires_grad=False) if there else None
