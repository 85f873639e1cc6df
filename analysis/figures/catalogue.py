"""One function per figure, named after what it shows. Each takes the findings of one or several captures.

Which figures of arXiv 2604.11791 they answer to stands in each docstring and in `Figure.paper`. A capture
that cannot be drawn is named in `Figure.absent` with the reason; a figure that no capture can be drawn in
is None.
"""

from collections.abc import Callable, Sequence

from ..findings import Findings
from ..verdicts import CONVERGED_STEP, SETTLED_ENTROPY
from . import answer_figures, map_figures, neuron_figures, stage_figures
from .head_figure import attention_heads
from .marks import Figure
from .panels import depth_figure, grouped_figure
from .paths import path_figure, trajectories
from .sequence_figure import single_sequences

_STAGE_MEASURES = ("mixing_score", "sink_rate", "colsum_concentration")


def steps(findings: Sequence[Findings]) -> Figure | None:
    """How far one recurrence moves each layer's residual: relative norm and cosine (figure 3)."""
    return grouped_figure(
        findings,
        name="steps",
        title="Steps from one recurrence to the next",
        paper="figure 3",
        x="recurrence",
        group="layer",
        measures=("relative_step", "step_cosine"),
        thresholds={"relative_step": (CONVERGED_STEP, f"converged at {CONVERGED_STEP:g}")},
    )


def distance_to_the_fixed_point(findings: Sequence[Findings]) -> Figure | None:
    """Distance of each layer's residual to its own after the last recurrence (figure 4)."""
    return grouped_figure(
        findings,
        name="distance_to_the_fixed_point",
        title="Distance to the state after the last recurrence",
        paper="figure 4",
        x="recurrence",
        group="layer",
        measures=("relative_gap",),
    )


def attention_settling(findings: Sequence[Findings]) -> Figure | None:
    """How much each layer's attention still changes from one recurrence to the next (as figure 2 claims)."""
    return grouped_figure(
        findings,
        name="attention_settling",
        title="Attention settling",
        paper="the claim of figure 2",
        x="recurrence",
        group="layer",
        measures=("entropy_change", "received_change"),
        thresholds={"entropy_change": (SETTLED_ENTROPY, f"settled at {SETTLED_ENTROPY:g} nat")},
    )


def attention_distances(findings: Sequence[Findings]) -> Figure | None:
    """Distance of each layer's attention to its own one recurrence earlier and after the last (figure 2)."""
    return grouped_figure(
        findings,
        name="attention_distances",
        title="Attention against the recurrence before and the last",
        paper="figure 2",
        x="recurrence",
        group="layer",
        measures=("attention_step", "attention_gap"),
    )


def trajectory(findings: Sequence[Findings]) -> Figure | None:
    """Path of one token's residual through the core, on its first two principal components (figure 5)."""
    return path_figure(
        findings, name="trajectory", title="One token's path through the loop", paper="figure 5"
    )


def stages_by_depth(findings: Sequence[Findings]) -> Figure | None:
    """Mixing score, sink rate and ColSum concentration along realised depth (figures 7 and 8)."""
    return depth_figure(
        findings,
        name="stages_by_depth",
        title="Stages of attention by depth",
        paper="figures 7 and 8",
        rows=[(name,) for name in _STAGE_MEASURES],
    )


def stages_by_recurrence(findings: Sequence[Findings]) -> Figure | None:
    """The same three over the core's layers, one line a recurrence (figures 7, 8)."""
    return grouped_figure(
        findings,
        name="stages_by_recurrence",
        title="Stages of attention within each recurrence",
        paper="figures 7 and 8, by recurrence",
        measures=_STAGE_MEASURES,
        x="layer",
        group="recurrence",
    )


def stages_by_layer(findings: Sequence[Findings]) -> Figure | None:
    """The same three over recurrences, one line a layer (figures 7 and 8, grouped by layer)."""
    return grouped_figure(
        findings,
        name="stages_by_layer",
        title="Stages of attention of each layer across recurrences",
        paper="figures 7 and 8, by layer",
        measures=_STAGE_MEASURES,
        x="recurrence",
        group="layer",
    )


def residual_norms(findings: Sequence[Findings]) -> Figure | None:
    """Norm and largest channel of the residual along realised depth (figure 9)."""
    return depth_figure(
        findings,
        name="residual_norms",
        title="Residual norms by depth",
        paper="figure 9",
        rows=[("residual_norm",), ("residual_peak", "residual_peak_max")],
    )


def residual_entropy(findings: Sequence[Findings]) -> Figure | None:
    """Matrix-based entropy of the residuals along realised depth (with figures 32 and 33)."""
    return depth_figure(
        findings,
        name="residual_entropy",
        title="Residual entropy by depth",
        paper="figures 32 and 33 by our reading",
        rows=[("residual_entropy",)],
    )


def lens(findings: Sequence[Findings]) -> Figure | None:
    """What the loop state predicts after each recurrence, through the model's own head (logit lens)."""
    return grouped_figure(
        findings,
        name="lens",
        title="What the loop state predicts",
        paper="",
        x="recurrence",
        group="layer",
        measures=("lens_kl", "lens_settled", "lens_entropy"),
        at_loop_state=True,
    )


def exit_gate(findings: Sequence[Findings]) -> Figure | None:
    """Where the model's exit gate would leave the loop."""
    return grouped_figure(
        findings,
        name="exit_gate",
        title="Where the exit gate would leave",
        paper="",
        x="recurrence",
        group="layer",
        measures=("exit_probability",),
        at_loop_state=True,
    )


FIGURES: tuple[Callable[[Sequence[Findings]], Figure | None], ...] = (
    steps,
    distance_to_the_fixed_point,
    answer_figures.rates,
    answer_figures.limits,
    trajectory,
    trajectories,
    map_figures.residual_similarity,
    attention_settling,
    attention_distances,
    map_figures.attention_distance,
    attention_heads,
    stages_by_depth,
    stages_by_recurrence,
    stages_by_layer,
    stage_figures.stages_repeat,
    stage_figures.stages_like_the_reference,
    stage_figures.profiles_beside_the_reference,
    residual_norms,
    residual_entropy,
    neuron_figures.neurons,
    single_sequences,
    lens,
    answer_figures.settling,
    exit_gate,
)
