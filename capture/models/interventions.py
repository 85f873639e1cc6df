"""Changes to a forward pass, to see what depends on them: a tap around another tap."""

from dataclasses import dataclass, field

from torch import Tensor

from ...kernels.residual_norm import Residual, row_norm
from .loop_schedule import Step
from .tap import Half, HalfNorms, Packed, Plain


@dataclass(frozen=True)
class Interventions:
    """Changes to make: branches cut off, and the prelude's output replaced; none by default.

    Source: arXiv 2604.11791, figure 41 (an MLP's output set to zero).
    """

    zeroed: frozenset[tuple[int, Half]] = field(default_factory=frozenset)
    """Halves of block invocations, by depth, whose output is set to zero before any norm of it."""
    prelude_direction_ND: Tensor | None = None
    """Directions that every token's prelude output is turned to, with its own norm kept."""

    def around(self, tap: Plain) -> Plain:
        """Returns a tap that makes these changes, around a tap that is to listen to the model as changed."""
        is_changed = self.zeroed or self.prelude_direction_ND is not None
        return _Intervening(self, tap) if is_changed else tap


class _Intervening(Plain):
    """Changes what the model does, and hands all to the tap inside as changed."""

    def __init__(self, interventions: Interventions, inside: Plain) -> None:
        self._zeroed, self._direction_ND = interventions.zeroed, interventions.prelude_direction_ND
        self._inside = inside

    def attention(
        self, step: Step, q_NHC: Tensor, k_NKC: Tensor, v_NKC: Tensor, batch: Packed, scale: float
    ) -> Tensor:
        return self._inside.attention(step, q_NHC, k_NKC, v_NKC, batch, scale)

    def residual(self, step: Step, half: Half, x_ND: Tensor, branch_ND: Tensor, norms: HalfNorms) -> Residual:
        if (step.depth, half) in self._zeroed:
            branch_ND = branch_ND.new_zeros(branch_ND.shape)
        return self._inside.residual(step, half, x_ND, branch_ND, norms)

    def prelude(self, output_ND: Tensor) -> Tensor:
        if (direction_ND := self._direction_ND) is not None:
            scale_N = row_norm(output_ND) / row_norm(direction_ND)
            output_ND = (direction_ND * scale_N.unsqueeze(-1)).to(output_ND.dtype)
        return self._inside.prelude(output_ND)

    def loop_state(self, step: Step, state_ND: Tensor) -> None:
        self._inside.loop_state(step, state_ND)
