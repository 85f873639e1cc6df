"""The tap that measures: everything a capture keeps is computed here, while the model runs.

Statistics are float32 of the stored residual and never share memory with the model's own tensors. The gaps
need each block's state after the last recurrence, and the lens needs the loop's. Either the states of all
recurrences are kept until then, or the loop is run twice and the first time (`LastStates`) leaves them
behind; both give the same numbers, and the plan says which the memory allows. What compares whole sequences
is in `distances.py`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.attention import attention_with_statistics
from ...kernels.lens import lens
from ...kernels.residual_norm import STATISTICS, Residual, residual_norm_statistics
from ..models.exit_gate import exit_probability
from ..models.loop_schedule import Schedule, Step
from ..models.model import LoopedModel
from ..models.tap import Half, HalfNorms, Packed, Plain
from ..store.quantities import QUANTITIES
from .distances import AttentionDistances, Pattern, ResidualDistances
from .history import BlockHistory


class StateSink(Protocol):
    """Takes the residuals that are kept."""

    def add(self, index: int, kept_KD: Tensor) -> None:
        """Takes the next K rows of the index-th kept depth; depths take turns, rows of each come in order.

        They may be the model's own tensor: to be copied before this returns, or on a GPU in stream order.
        """
        ...


@dataclass(frozen=True)
class Buffers:
    """Buffers for the statistics of some packed tokens: a slice of a unit's.

    `values` holds by quantity [depth, N], [depth, N, H], [recurrence, N], or of S sequences [depth, S],
    [depth, S, H], [depth, S, depth]; `states` gets the kept tokens' residuals in the model's dtype.
    """

    values: dict[str, Tensor]
    states: StateSink | None = None
    state_rows: Tensor | None = None  # rows of the N tokens that are kept, int64; None: all


class LastStates(Plain):
    """Keeps what each block of a loop, and the loop, leave at the last recurrence, and nothing else.

    Args:
        measures_attention: whether the run that follows takes attention statistics. They come with an
            attention of their own, which rounds otherwise; this run must round as that one does.
        keeps_patterns: whether attention patterns are kept too, for their gaps.
    """

    def __init__(self, schedule: Schedule, *, measures_attention: bool, keeps_patterns: bool = False) -> None:
        self.states: dict[int, Tensor] = {}  # by block
        self.patterns: dict[int, Pattern] = {}  # by block
        self.end: Tensor | None = None  # the loop state after the last recurrence
        self._last_depths = schedule.last_depths
        self._measures_attention, self._keeps_patterns = measures_attention, keeps_patterns

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        if not self._measures_attention:
            return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)
        o_NHC, statistics = attention_with_statistics(
            q_NHC, k_NKC, v_NKC, batch.cu_seqlens_S, batch.max_length, scale, columns=False
        )
        if step.depth in self._last_depths and self._keeps_patterns:
            self.patterns[step.block] = Pattern(q_NHC, k_NKC, statistics.lse_NH)
        return o_NHC

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        result = super().residual(step, half, x_ND, branch_ND, norms)
        if half == "mlp" and step.depth in self._last_depths:
            self.states[step.block] = result.residual_ND
        return result

    def loop_state(self, step: Step, state_ND: Tensor) -> None:
        if step.depth in self._last_depths:
            self.end = state_ND


class Statistics(Plain):
    """Fills the buffers of one batch.

    Args:
        buffers: written in place, some of it when the last block has run; what is not computed (steps at the
            first recurrence, gaps outside of loops) is left as it is.
        state_depths: depths whose residual is kept.
        last: a first run of the same tokens; without it, states of all recurrences are kept if gaps or the
            lens are wanted.
        model: whose head and exit gate read the loop states; only these quantities need it.
    """

    def __init__(
        self,
        schedule: Schedule,
        buffers: Buffers,
        *,
        sink_tokens: int = 1,
        state_depths: Sequence[int] = (),
        last: LastStates | None = None,
        model: LoopedModel | None = None,
    ) -> None:
        self._last_depths = schedule.last_depths
        self._end_depth = schedule.depth - 1
        self._out = buffers
        self._wanted: Collection[str] = buffers.values.keys()
        self._sink_tokens = sink_tokens
        self._state_index = {depth: index for index, depth in enumerate(state_depths)}
        self._residual = any(name in STATISTICS for name in self._wanted)
        self._steps = any(name.startswith("step_") for name in self._wanted)
        self._gaps = any(name.startswith("gap_") for name in self._wanted)
        self._attention = any(name.startswith("attention_") for name in self._wanted)
        self._lens = any(name.startswith("lens_") for name in self._wanted)
        self._first_run, self._model = last, model
        last_patterns = None if last is None else last.patterns
        self._attention_distances = AttentionDistances(schedule, buffers.values, last_patterns)
        self._residual_distances = ResidualDistances(schedule.depth, buffers.values)
        self._head_inputs: list[tuple[int, Tensor]] = []  # recurrence and what the head would read
        self._gate_logits: list[Tensor] = []
        self._measured: list[tuple[Step, Tensor]] = []  # rows of STATISTICS, [7, N]
        self._history = BlockHistory(steps=self._steps, gaps=self._gaps and last is None)
        self._block_input: Tensor | None = None
        self._batch: Packed | None = None

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        self._batch = batch
        if not self._attention:
            return super().attention(step, q_NHC, k_NKC, v_NKC, batch, scale)
        distances, wants_columns = self._attention_distances, "attention_received" in self._wanted
        # on a CPU columns come with the rows for next to nothing; on a GPU a comparison has them for nothing
        from_distances = wants_columns and q_NHC.is_cuda and distances.compares(step)
        o_NHC, measured = attention_with_statistics(
            q_NHC,
            k_NKC,
            v_NKC,
            batch.cu_seqlens_S,
            batch.max_length,
            scale,
            self._sink_tokens,
            columns=wants_columns and not from_distances,
        )
        for name in ("entropy", "peak", "sink"):
            self._put(step.depth, f"attention_{name}", getattr(measured, f"{name}_NH"))
        received_NH = distances.add(step, Pattern(q_NHC, k_NKC, measured.lse_NH), batch, scale)
        if from_distances:
            assert received_NH is not None
        else:
            received_NH = measured.received_NH
        self._put(step.depth, "attention_received", received_NH)
        return o_NHC

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        if half == "attention":
            self._block_input = x_ND
            return super().residual(step, half, x_ND, branch_ND, norms)
        if self._residual:
            result = self._measure_residual(step, x_ND, branch_ND, norms)
        else:
            result = super().residual(step, half, x_ND, branch_ND, norms)
        self._block_input = None
        state_ND = result.residual_ND
        if self._out.states is not None and step.depth in self._state_index:
            rows = self._out.state_rows
            kept_KD = state_ND if rows is None else state_ND[rows]
            self._out.states.add(self._state_index[step.depth], kept_KD)
        assert self._batch is not None, "a block attends before it leaves its residual"
        self._residual_distances.add(step, state_ND, self._batch)
        if step.depth == self._end_depth:
            self._finish(self._batch)
        return result

    def loop_state(self, step: Step, state_ND: Tensor) -> None:
        if "exit_probability" in self._wanted:
            assert self._model is not None
            self._gate_logits.append(self._model.exit_gate_logits(state_ND))
            if step.depth in self._last_depths:
                self._out.values["exit_probability"][:] = exit_probability(torch.stack(self._gate_logits))
        if self._lens:
            self._measure_lens(step, state_ND)

    def _measure_lens(self, step: Step, state_ND: Tensor) -> None:
        assert self._model is not None
        model, first = self._model, self._first_run
        self._head_inputs.append((step.recurrence, model.read_out(state_ND)))
        if "lens_kl" not in self._wanted:
            last_ND = self._head_inputs[-1][1]  # no distance to it is kept
        elif first is not None:
            assert first.end is not None
            last_ND = model.read_out(first.end)
        elif step.depth in self._last_depths:
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

    def _measure_residual(self, step: Step, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        in_loop, first_run, history = step.recurrence >= 0, self._first_run, self._history
        result, measured_SN = residual_norm_statistics(
            x_ND,
            branch_ND,
            **vars(norms),
            block_input_ND=self._block_input if "update_norm" in self._wanted else None,
            previous_ND=history.previous(step.block) if in_loop else None,
            last_ND=first_run.states[step.block] if in_loop and self._gaps and first_run else None,
        )
        self._measured.append((step, measured_SN))
        if in_loop:
            history.add(step.block, step.depth, result.residual_ND, measured_SN[0])
        if step.depth in self._last_depths:
            for depth, gap in history.gaps(step.block):
                self._put(depth, "gap_norm", gap.norm_N)
                self._put(depth, "gap_cosine", gap.cosine_N)
        return result

    def _finish(self, batch: Packed) -> None:
        """Moves what was set aside into the buffers, all depths at once; called after the last block."""
        self._attention_distances.finish(batch)
        self._residual_distances.finish(batch)
        if not self._measured:
            return
        steps, parts = zip(*self._measured, strict=True)
        measured_LSN = torch.stack(parts)
        self._measured = []
        for row, name in enumerate(STATISTICS):
            if name in self._wanted and (self._first_run or not name.startswith("gap_")):
                depths = [s.depth for s in steps if s.recurrence >= QUANTITIES[name].first_recurrence]
                self._out.values[name][depths] = measured_LSN[depths, row]

    def _put(self, depth: int, name: str, value: Tensor) -> None:
        if name in self._wanted:
            self._out.values[name][depth] = value
