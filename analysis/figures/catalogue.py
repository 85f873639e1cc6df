"""Every figure of a report, in the order a report shows them.

A figure is a function that is named after what it shows and takes the findings of one or several captures.
It says beside what it draws what is seen in it (`Figure.caption`), and which figures of arXiv 2604.11791 it
answers to in its docstring and in `Figure.paper`. A capture that cannot be drawn is named in `Figure.absent`
with the reason; a figure that no capture can be drawn in is None.
"""

from collections.abc import Callable, Sequence

from ..findings import Findings
from .answer_figures import limits, rates, settling
from .convergence_figures import attention_distances, attention_settling, distance_to_the_fixed_point, steps
from .head_figure import attention_heads
from .loop_state_figures import exit_gate, lens
from .map_figures import attention_distance, residual_similarity
from .marks import Figure
from .neuron_figures import neurons
from .paths import trajectories, trajectory
from .residual_figures import residual_entropy, residual_norms
from .sequence_figure import single_sequences
from .stage_figures import (
    profiles_beside_the_reference,
    stages_by_depth,
    stages_by_layer,
    stages_by_recurrence,
    stages_like_the_reference,
    stages_repeat,
)

FIGURES: tuple[Callable[[Sequence[Findings]], Figure | None], ...] = (
    steps,
    distance_to_the_fixed_point,
    rates,
    limits,
    trajectory,
    trajectories,
    residual_similarity,
    attention_settling,
    attention_distances,
    attention_distance,
    attention_heads,
    stages_by_depth,
    stages_by_recurrence,
    stages_by_layer,
    stages_repeat,
    stages_like_the_reference,
    profiles_beside_the_reference,
    residual_norms,
    residual_entropy,
    neurons,
    single_sequences,
    lens,
    settling,
    exit_gate,
)
