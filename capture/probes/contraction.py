"""The contraction factor of a loop: what one recurrence multiplies a small difference by, in the long run.

It is the spectral radius of the Jacobian of the map from the state that enters a recurrence to the one that
enters the next, taken where many recurrences have led. Attention is causal, so that Jacobian is block
triangular over the tokens of a sequence, and its eigenvalues are those of each token's own block: what a
token's next state owes to its own state, all other tokens held. Every token has a factor of its own, the
largest of them is the factor of the whole map, and one product of the Jacobian with a vector advances the
power iterations of all tokens together.

What it does not tell: differences that grow for a while before they shrink, within a token or from one token
to later ones (the blocks below the diagonal). Where the state has not settled it says how the loop would act
at that state, and nothing about a fixed point; `step_N` tells.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from ...errors import RequestError, UnfitError
from ..models.model import PLAIN, LoopedModel
from ..models.tap import Packed, Plain
from ..taps.frozen import KeysValues, OthersFrozen

RECURRENCES = 128  # where the paper takes the fixed point (arXiv 2604.11791, section 4.1)
ITERATIONS = 100  # within 1.2 % of the dense radius on random loops of width 256 (pre, Huginn; 3 tokens each)
_QUARTERS = 4


@dataclass(frozen=True)
class Contraction:
    """The result of power iteration, by token; float64 [N] each."""

    factor_N: Tensor
    """Growth of a difference in one recurrence, its geometric mean over the second half of the iterations;
    below 1 differences shrink.
    """
    spread_N: Tensor
    """Difference between the third and the last quarter of the iterations."""
    step_N: Tensor
    """‖x_t − x_{t−1}‖ / ‖x_t‖ where it was taken: near rounding at a fixed point."""
    recurrences: int
    """Recurrences after which the factor was taken."""
    epsilon: float
    """Machine epsilon of the dtype that it was taken in."""


def contraction(
    model: LoopedModel,
    batch: Packed,
    initial_state_ND: Tensor | None = None,
    *,
    recurrences: int = RECURRENCES,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> Contraction:
    """The contraction factor of every token of some prompts.

    Attention of one layer is written down, [heads, N, N]: for short prompts.

    Args:
        initial_state_ND: initial state, as the model takes it.
        recurrences: how often to run the loop first, whatever the model's own number.
        iterations: number of power iterations. seed: seed of the differences that they start from.
    Raises:
        UnfitError: the model has no loop, or several.
    """
    d = model.description
    if d.only_loop is None:
        number = f"{len(d.loops)} loops" if d.loops else "no loop"
        raise UnfitError(f"{d.notation} has {number} and so no contraction factor")
    is_drawn = d.initial_state != "prelude"
    assert initial_state_ND is not None or not is_drawn, "this model's loop starts from a drawn state"
    steps = next(visit for visit in d.visits if visit[0].recurrence == 0)
    kept, run = KeysValues(batch), model.begin(batch, PLAIN)

    def recur(state_ND: Tensor, tap: Plain) -> Tensor:
        return model.recur(steps, state_ND, prelude_ND, run._replace(tap=tap))

    with torch.no_grad():
        prelude_ND = model.run_prelude(run)
        state_ND = prelude_ND if initial_state_ND is None else initial_state_ND.to(prelude_ND)
        before_ND = state_ND
        for _ in range(recurrences):
            before_ND, state_ND = state_ND, recur(state_ND, PLAIN)
        recur(state_ND, kept)
        frozen = OthersFrozen(kept)
        factor_N, spread_N = power_iteration(lambda x_ND: recur(x_ND, frozen), state_ND, iterations, seed)
    step_N = (state_ND - before_ND).double().norm(dim=-1) / state_ND.double().norm(dim=-1)
    return Contraction(factor_N, spread_N, step_N, recurrences, torch.finfo(model.dtype).eps)


def power_iteration(
    function: Callable[[Tensor], Tensor], x_ND: Tensor, iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Spectral radius of every row's own Jacobian, of a function whose rows do not touch one another.

    The growth of a vector under the Jacobian turns with the phase of a leading complex pair, and never
    settles; its geometric mean over many iterations does, at the pair's modulus, with an error that falls as
    one over their number. So the mean is what counts, over the second half, when what is smaller has faded.

    Returns:
        the radius and how far its third and last quarter are apart, float64 [N].
    """
    if iterations < _QUARTERS:
        raise RequestError(f"iterations must be at least {_QUARTERS}, got {iterations}")
    generator = torch.Generator().manual_seed(seed)
    v_ND = torch.randn(x_ND.shape, generator=generator).to(x_ND)
    v_ND = v_ND / v_ND.norm(dim=-1, keepdim=True)
    log_growth = []
    for _ in range(iterations):
        v_ND = jvp(function, (x_ND,), (v_ND,))[1]
        norm_N = torch.linalg.vector_norm(v_ND, dim=-1, dtype=torch.promote_types(v_ND.dtype, torch.float32))
        log_growth.append(norm_N.double().log())
        scale_N = torch.where(norm_N > 0, norm_N, 1)  # what has vanished stays at zero
        v_ND = (v_ND / scale_N.unsqueeze(-1)).to(x_ND.dtype)
    log_growth_IN, quarter = torch.stack(log_growth), iterations // _QUARTERS
    third_N, last_N = log_growth_IN[-2 * quarter : -quarter].mean(0), log_growth_IN[-quarter:].mean(0)
    spread_N = (third_N.exp() - last_N.exp()).abs()
    return ((third_N + last_N) / 2).exp(), spread_N
