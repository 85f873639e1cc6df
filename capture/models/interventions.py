"""What a forward pass is made to do otherwise, to see what depends on it."""

from dataclasses import dataclass, field

from torch import Tensor

from ...kernels.residual_norm import row_norm
from .tap import Half


@dataclass(frozen=True)
class Interventions:
    """Branches cut off, and the prelude's output replaced; nothing by default.

    Source: arXiv 2604.11791, figure 41 (an MLP's output set to zero).
    """

    zeroed: frozenset[tuple[int, Half]] = field(default_factory=frozenset)
    """Halves of block invocations, by depth, whose output is zero before any norm of it."""
    prelude_direction_ND: Tensor | None = None
    """Every token's prelude output is turned this way and keeps its own norm."""

    def on_branch(self, depth: int, half: Half, branch_ND: Tensor) -> Tensor:
        """What the residual add gets of one half of a block."""
        return branch_ND.new_zeros(branch_ND.shape) if (depth, half) in self.zeroed else branch_ND

    def on_prelude(self, output_ND: Tensor) -> Tensor:
        """What the loop gets of the prelude."""
        if (direction_ND := self.prelude_direction_ND) is None:
            return output_ND
        scale_N = row_norm(output_ND) / row_norm(direction_ND)
        return (direction_ND * scale_N.unsqueeze(-1)).to(output_ND.dtype)


NONE = Interventions()
