"""Every analysis that is more than a curve over depth, by name."""

from .answers.common_plane import ANALYSES as _PATHS
from .answers.distinctness import ANALYSES as _DISTINCTNESS
from .answers.heads import ANALYSES as _HEADS
from .answers.limits import ANALYSES as _LIMITS
from .answers.neuron_shares import ANALYSES as _NEURONS
from .answers.rates import ANALYSES as _RATES
from .answers.settling import ANALYSES as _SETTLING
from .answers.similarity import ANALYSES as _SIMILARITY
from .answers.single_sequences import ANALYSES as _SEQUENCES
from .answers.stages import ANALYSES as _STAGES
from .answers.trajectory import ANALYSES as _PATH
from .answers.two_scale import ANALYSES as _TWO_SCALE
from .walk import Analysis

ANALYSES: dict[str, Analysis] = {
    each.name: each
    for each in (
        *_LIMITS,
        *_RATES,
        *_TWO_SCALE,
        *_SIMILARITY,
        *_SETTLING,
        *_STAGES,
        *_HEADS,
        *_SEQUENCES,
        *_NEURONS,
        *_PATHS,
        *_PATH,
        *_DISTINCTNESS,
    )
}
