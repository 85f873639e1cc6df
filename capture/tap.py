"""The tap that measures: everything a capture keeps is computed here, while the model runs.

Statistics are float32 of the stored residual and never share memory with the model's own tensors. The gaps
need each layer's state after the last recurrence. Either the states of all recurrences are kept until then,
or the loop is run twice and the first time (`LastStates`) leaves them behind; both give the same numbers, and
the plan says which the memory allows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.attention import attention_with_statistics
from ..kernels.residual_norm import Residual, distance, row_norm, row_peak
from .models.description import Description, Step
from .models.tap import Half, HalfNorms, Plain


@dataclass(frozen=True)
class Buffers:
    """Where statistics of some packed tokens go: a slice of a unit's.

    `values` holds float32 [depth, N] or [depth, N, H] by quantity; `state` [depth_state, kept tokens, D] in
    the model's dtype.
    """

    values: dict[str, Tensor]
    state: Tensor | None = None
    state_rows: Tensor | None = None  # which of the N tokens are kept, int64


class LastStates(Plain):
    """Keeps what each core layer leaves at the last recurrence, and nothing else.

    Args:
        measures_attention: whether the run that follows takes attention statistics. They come with an
            attention of their own, which rounds otherwise; this run must round as that one does.
    """

    def __init__(self, description: Description, *, measures_attention: bool) -> None:
        self.states: dict[int, Tensor] = {}  # by layer
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


class Statistics(Plain):
    """Fills the buffers of one batch.

    Args:
        buffers: written in place; what is not computed (steps at the first recurrence, gaps outside the core)
            is left as it is.
        state_depths: depths whose residual is kept.
        last_states: from `LastStates`; without them, states of all recurrences are kept if gaps are wanted.
    """

    def __init__(
        self,
        description: Description,
        buffers: Buffers,
        *,
        sink_tokens: int = 1,
        state_depths: Sequence[int] = (),
        last_states: dict[int, Tensor] | None = None,
    ) -> None:
        self._last = description.recurrences - 1
        self._out = buffers
        self._wanted: Collection[str] = buffers.values.keys()
        self._sink_tokens = sink_tokens
        self._state_index = {depth: index for index, depth in enumerate(state_depths)}
        self._steps = any(name.startswith("step_") for name in self._wanted)
        self._gaps = any(name.startswith("gap_") for name in self._wanted)
        self._attention = any(name.startswith("attention_") for name in self._wanted)
        self._last_states = last_states
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

    def _measure_steps(self, step: Step, state_ND: Tensor, norm_N: Tensor) -> None:
        if not self._steps:
            return
        if step.recurrence > 0:
            self._put_distance(step, "step", (state_ND, norm_N), self._before[step.layer])
        self._before[step.layer] = (state_ND, norm_N)

    def _measure_gaps(self, step: Step, state_ND: Tensor, norm_N: Tensor) -> None:
        if not self._gaps:
            return
        if self._last_states is not None:
            last_ND = self._last_states[step.layer]
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
