"""The tap that measures: everything a capture keeps is computed here, while the model runs.

Statistics are float32 of the stored residual and never share memory with the model's own tensors. The gaps
need each layer's state after the last recurrence, and the lens needs the loop's. Either the states of all
recurrences are kept until then, or the loop is run twice and the first time (`LastStates`) leaves them
behind; both give the same numbers, and the plan says which the memory allows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention import attention_with_statistics
from ..kernels.lens import lens
from ..kernels.residual_norm import Residual, distance, row_norm, row_peak
from .models.description import Description, Step
from .models.exit_gate import exit_probability
from .models.model import LoopedModel
from .models.tap import Half, HalfNorms, Plain


@dataclass(frozen=True)
class Buffers:
    """Where statistics of some packed tokens go: a slice of a unit's.

    `values` holds [depth, N], [depth, N, H] or [recurrence, N] by quantity; `state` [depth_state, kept
    tokens, D] in the model's dtype.
    """

    values: dict[str, Tensor]
    state: Tensor | None = None
    state_rows: Tensor | None = None  # which of the N tokens are kept, int64


class LastStates(Plain):
    """Keeps what each core layer and the loop leave at the last recurrence, and nothing else.

    Args:
        measures_attention: whether the run that follows takes attention statistics. They come with an
            attention of their own, which rounds otherwise; this run must round as that one does.
    """

    def __init__(self, description: Description, *, measures_attention: bool) -> None:
        self.states: dict[int, Tensor] = {}  # by layer
        self.end: Tensor | None = None  # the loop state after the last recurrence
        self._last = description.recurrences - 1
        self._measures_attention = measures_attention

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        if not self._measures_attention:
            return super().attention(step, q_NHC, k_NKC, v_NKC, lengths, scale)
        return attention_with_statistics(q_NHC, k_NKC, v_NKC, lengths, scale)[0]

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        result = super().residual(step, half, x_ND, branch_ND, norms)
        if half == "mlp" and step.recurrence == self._last:
            self.states[step.layer] = result.residual_ND
        return result

    def loop_state(self, recurrence: int, state_ND: Tensor) -> None:
        if recurrence == self._last:
            self.end = state_ND


class Statistics(Plain):
    """Fills the buffers of one batch.

    Args:
        buffers: written in place; what is not computed (steps at the first recurrence, gaps outside the core)
            is left as it is.
        state_depths: depths whose residual is kept.
        last: a first run of the same tokens; without it, states of all recurrences are kept if gaps or the
            lens are wanted.
        model: whose head and exit gate read the loop states; only these quantities need it.
    """

    def __init__(
        self,
        description: Description,
        buffers: Buffers,
        *,
        sink_tokens: int = 1,
        state_depths: Sequence[int] = (),
        last: LastStates | None = None,
        model: LoopedModel | None = None,
    ) -> None:
        self._last = description.recurrences - 1
        self._out = buffers
        self._wanted: Collection[str] = buffers.values.keys()
        self._sink_tokens = sink_tokens
        self._state_index = {depth: index for index, depth in enumerate(state_depths)}
        self._steps = any(name.startswith("step_") for name in self._wanted)
        self._gaps = any(name.startswith("gap_") for name in self._wanted)
        self._attention = any(name.startswith("attention_") for name in self._wanted)
        self._lens = any(name.startswith("lens_") for name in self._wanted)
        self._first_run, self._model = last, model
        self._head_inputs: list[tuple[int, Tensor]] = []  # recurrence and what the head would read
        self._gate_logits: list[Tensor] = []
        # by layer: the previous recurrence's state and its norm
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: dict[int, list[tuple[Step, Tensor, Tensor]]] = {}  # by layer: states waiting for the last
        self._block_input: Tensor | None = None

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        if not self._attention:
            return super().attention(step, q_NHC, k_NKC, v_NKC, lengths, scale)
        o_NHC, statistics = attention_with_statistics(q_NHC, k_NKC, v_NKC, lengths, scale, self._sink_tokens)
        self._put(step, "attention_entropy", statistics.entropy_NH)
        self._put(step, "attention_peak", statistics.peak_NH)
        self._put(step, "attention_sink", statistics.sink_NH)
        self._put(step, "attention_received", statistics.received_NH)
        return o_NHC

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        result = super().residual(step, half, x_ND, branch_ND, norms)
        if half == "attention":
            self._block_input = x_ND
            return result
        state_ND = result.residual_ND
        norm_N = row_norm(state_ND)
        self._put(step, "residual_norm", norm_N)
        if "residual_peak" in self._wanted:
            self._put(step, "residual_peak", row_peak(state_ND))
        if "update_norm" in self._wanted:
            assert self._block_input is not None
            self._put(step, "update_norm", row_norm(state_ND.float() - self._block_input.float()))
        self._block_input = None
        if step.recurrence >= 0:
            self._measure_steps(step, state_ND, norm_N)
            self._measure_gaps(step, state_ND, norm_N)
        if self._out.state is not None and step.depth in self._state_index:
            assert self._out.state_rows is not None
            self._out.state[self._state_index[step.depth]] = state_ND[self._out.state_rows]
        return result

    def loop_state(self, recurrence: int, state_ND: Tensor) -> None:
        if "exit_probability" in self._wanted:
            assert self._model is not None
            self._gate_logits.append(self._model.exit_gate_logits(state_ND))
            if recurrence == self._last:
                self._out.values["exit_probability"][:] = exit_probability(torch.stack(self._gate_logits))
        if self._lens:
            self._measure_lens(recurrence, state_ND)

    def _measure_lens(self, recurrence: int, state_ND: Tensor) -> None:
        assert self._model is not None
        model, first = self._model, self._first_run
        self._head_inputs.append((recurrence, model.read_out(state_ND)))
        if "lens_kl" not in self._wanted:
            last_ND = self._head_inputs[-1][1]  # no distance to it is kept
        elif first is not None:
            assert first.end is not None
            last_ND = model.read_out(first.end)
        elif recurrence == self._last:
            last_ND = self._head_inputs[-1][1]
        else:
            return
        waiting, self._head_inputs = self._head_inputs, []
        measured = lens(
            [state for _, state in waiting], last_ND, model.head_weight, model.description.logit_scale
        )
        for name, values_RN in zip(("lens_kl", "lens_entropy", "lens_token"), measured, strict=True):
            if name in self._wanted:
                self._out.values[name][[index for index, _ in waiting]] = values_RN

    def _measure_steps(self, step: Step, state_ND: Tensor, norm_N: Tensor) -> None:
        if not self._steps:
            return
        if step.recurrence > 0:
            self._put_distance(step, "step", (state_ND, norm_N), self._before[step.layer])
        self._before[step.layer] = (state_ND, norm_N)

    def _measure_gaps(self, step: Step, state_ND: Tensor, norm_N: Tensor) -> None:
        if not self._gaps:
            return
        if self._first_run is not None:
            last_ND = self._first_run.states[step.layer]
            self._put_distance(step, "gap", (state_ND, norm_N), (last_ND, row_norm(last_ND)))
            return
        self._kept.setdefault(step.layer, []).append((step, state_ND, norm_N))
        if step.recurrence == self._last:
            for kept_step, kept_ND, kept_norm_N in self._kept.pop(step.layer):
                self._put_distance(kept_step, "gap", (kept_ND, kept_norm_N), (state_ND, norm_N))

    def _put_distance(
        self, step: Step, kind: str, state: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]
    ) -> None:
        measured = distance(state[0], reference[0], state[1], reference[1])
        self._put(step, f"{kind}_norm", measured.norm_N)
        self._put(step, f"{kind}_cosine", measured.cosine_N)

    def _put(self, step: Step, name: str, value: Tensor) -> None:
        if name in self._wanted:
            self._out.values[name][step.depth] = value
