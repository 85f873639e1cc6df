"""Residuals that a block's is compared with: what the block left one recurrence earlier, and what it leaves
at its last one. Our taps and the watching of modules both keep earlier residuals here.
"""

from collections.abc import Iterator

from torch import Tensor

from ...kernels.residual_norm import Distance, distance


class BlockHistory:
    """Residuals of the blocks of loops, by block.

    Args:
        steps: whether the residual of the recurrence before is asked for.
        gaps: whether all are kept until a block has run for the last time.
    """

    def __init__(self, *, steps: bool, gaps: bool) -> None:
        self._steps, self._gaps = steps, gaps
        self._states: dict[int, list[tuple[int, Tensor, Tensor]]] = {}  # depth, residual, its norm

    def previous(self, block: int) -> Tensor | None:
        """Returns the residual [N, D] of the recurrence before; None at the first, or without steps."""
        states = self._states.get(block)
        return states[-1][1] if self._steps and states else None

    def add(self, block: int, depth: int, state_ND: Tensor, norm_N: Tensor) -> None:
        """Takes in what a block of a loop leaves, and its norm, float32 [N]."""
        states = self._states.setdefault(block, [])
        if not self._gaps:
            states.clear()
        if self._gaps or self._steps:
            states.append((depth, state_ND, norm_N))

    def gaps(self, block: int) -> Iterator[tuple[int, Distance]]:
        """Yields a block's depths, and distances of its residuals there to the last one; forgets them."""
        if not self._gaps:
            return
        *_, (_, last_ND, last_norm_N) = states = self._states.pop(block)
        for depth, state_ND, norm_N in states:
            yield depth, distance(state_ND, last_ND, norm_N, last_norm_N)
