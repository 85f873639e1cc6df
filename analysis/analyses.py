"""Every analysis that is more than a curve over depth, by name."""

from .heads import ANALYSES as _HEADS
from .limits import ANALYSES as _LIMITS
from .neurons import ANALYSES as _NEURONS
from .rates import ANALYSES as _RATES
from .sequences import ANALYSES as _SEQUENCES
from .settling import ANALYSES as _SETTLING
from .similarity import ANALYSES as _SIMILARITY
from .stages import ANALYSES as _STAGES
from .trajectories import ANALYSES as _PATHS
from .two_scale import ANALYSES as _TWO_SCALE
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
    )
}
