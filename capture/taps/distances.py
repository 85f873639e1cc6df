"""Comparisons of whole sequences: of attention patterns with each other, and of blocks' residuals.

A pattern is known by its queries, keys and the logarithm of each row's sum; no attention matrix is ever
formed. Distances to the recurrence before need one earlier pattern per block, those to the last recurrence
all of them (or a first run that left the last ones behind), and the maps over all pairs of block invocations
need everything until the last block has run.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ...kernels.attention_pairs import attention_chain, attention_gram, distance_from_gram
from ...kernels.residual_pairs import residual_entropy, residual_similarity
from ..models.loop_schedule import Schedule, Step
from ..models.tap import Packed

PATTERNS_AT_ONCE = 4  # what the GPU's kernel compares in one pass


class Pattern(NamedTuple):
    """Queries, keys and sums that an attention matrix follows from."""

    q_NHC: Tensor
    k_NKC: Tensor
    lse_NH: Tensor


class AttentionDistances:
    """attention_step, attention_gap and attention_distance of one batch; nothing where none is wanted.

    Args:
        values: buffers by quantity, [depth, S, H] or [depth, S, depth], written in place.
        last: patterns of the last recurrence by block, from a first run of the same tokens.
    """

    def __init__(
        self, schedule: Schedule, values: Mapping[str, Tensor], last: Mapping[int, Pattern] | None
    ) -> None:
        self._depth, self._last_depths = schedule.depth, schedule.last_depths
        self._values, self._last = values, last
        self._before: dict[int, Pattern] = {}  # by block: the recurrence before
        self._waiting: dict[int, list[tuple[Step, Pattern]]] = {}  # by block: for the last recurrence
        self._all: list[Tensor] = []  # q, k and lse of every depth, stacked
        self._scale = 1.0

    def compares(self, step: Step) -> bool:
        """Whether this step's pattern is compared at once, which gives its columns as well."""
        return bool(self._names(step))

    def add(self, step: Step, pattern: Pattern, batch: Packed, scale: float) -> Tensor | None:
        """Takes in one block's pattern; returns what its keys receive, [N, H], if it `compares` the step."""
        if "attention_distance" in self._values:
            self._keep(step, pattern, scale)
        names, received_NH = self._names(step), None
        if names:
            has_step, has_gap = "attention_step" in names, "attention_gap" in names
            before = [self._before[step.block]] if has_step else []
            chain = [*before, pattern, *([self._last[step.block]] if has_gap and self._last else [])]
            pairs = [(index, index + 1) for index in range(len(names))]
            received_RNH, distance_PSH = _compare(chain, pairs, batch, scale)
            for name, distance_SH in zip(names, distance_PSH, strict=True):
                self._values[name][step.depth] = distance_SH
            received_NH = received_RNH[len(before)]
        if step.recurrence >= 0 and "attention_step" in self._values:
            self._before[step.block] = pattern
        if step.recurrence >= 0 and "attention_gap" in self._values and self._last is None:
            self._wait(step, pattern, batch, scale)
        return received_NH

    def finish(self, batch: Packed) -> None:
        """Fills attention_distance; called after the last block."""
        if self._all:
            q_LNHC, k_LNKC, lse_LNH = self._all
            gram_SHLL = attention_gram(
                q_LNHC, k_LNKC, lse_LNH, batch.cu_seqlens_S, batch.max_length, self._scale
            )
            self._values["attention_distance"][:] = distance_from_gram(gram_SHLL).transpose(0, 1)
            self._all = []

    def _names(self, step: Step) -> list[str]:
        """Names of the quantities that the step's pattern can be compared for at once."""
        found = ["attention_step"] if step.recurrence > 0 else []
        found += ["attention_gap"] if step.recurrence >= 0 and self._last is not None else []
        return [name for name in found if name in self._values]

    def _wait(self, step: Step, pattern: Pattern, batch: Packed, scale: float) -> None:
        """Keeps patterns until the last recurrence's is there, and compares them a few at a time."""
        self._waiting.setdefault(step.block, []).append((step, pattern))
        if step.depth not in self._last_depths:
            return
        waiting = self._waiting.pop(step.block)
        for start in range(0, len(waiting), PATTERNS_AT_ONCE - 1):
            group = waiting[start : start + PATTERNS_AT_ONCE - 1]
            chain = [kept for _, kept in group] + [pattern]
            pairs = [(index, len(group)) for index in range(len(group))]
            _, distance_PSH = _compare(chain, pairs, batch, scale)
            for (kept_step, _), distance_SH in zip(group, distance_PSH, strict=True):
                self._values["attention_gap"][kept_step.depth] = distance_SH

    def _keep(self, step: Step, pattern: Pattern, scale: float) -> None:
        if not self._all:
            self._all = [part.new_empty(self._depth, *part.shape) for part in pattern]
            self._scale = scale
        for kept, part in zip(self._all, pattern, strict=True):
            kept[step.depth] = part


class ResidualDistances:
    """residual_similarity and residual_entropy of one batch; nothing where neither is wanted."""

    def __init__(self, depth: int, values: Mapping[str, Tensor]) -> None:
        self._depth, self._values = depth, values
        self._all: Tensor | None = None  # residuals of every depth

    def add(self, step: Step, state_ND: Tensor, batch: Packed) -> None:
        """Takes in what one block leaves."""
        if "residual_entropy" in self._values:
            self._values["residual_entropy"][step.depth] = residual_entropy(state_ND, batch.lengths)
        if "residual_similarity" in self._values:
            if self._all is None:
                self._all = state_ND.new_empty(self._depth, *state_ND.shape)
            self._all[step.depth] = state_ND

    def finish(self, batch: Packed) -> None:
        """Fills residual_similarity; called after the last block."""
        if self._all is not None:
            similarity_SLL = residual_similarity(self._all, batch.lengths)
            self._values["residual_similarity"][:] = similarity_SLL.transpose(0, 1)
            self._all = None


def _compare(
    chain: list[Pattern], pairs: list[tuple[int, int]], batch: Packed, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns what keys receive, [patterns, N, H], and the distance of each pair, [pairs, S, H]."""
    q, k, lse = zip(*chain, strict=True)
    return attention_chain(q, k, lse, batch.cu_seqlens_S, batch.max_length, scale, pairs)
