"""The questions of a report, which every capture is asked, each with its threshold and the reason for it."""

from dataclasses import dataclass

import numpy as np

from .answers.limits import TAU
from .thresholds import CONVERGED_STEP, DISTINCT_COSINE, REPEATED_STAGES, SETTLED_ENTROPY

# two states of one norm at the cosine 1 - tau of the paper's fixed points lie this share of it apart
STABLE_GAP = float(np.sqrt(2 * TAU))
OURS, PAPERS = "our choice", "from the paper's tau, appendix C"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question that every capture is asked, and the value that means yes."""

    name: str
    text: str
    threshold: float
    relation: str
    """relation of the value to the threshold that means yes: at most, at least or below"""
    unit: str
    reason: str
    """reason for this threshold"""
    source: str = OURS
    """source of the threshold"""
    figure: str
    """name of the figure that shows it"""


CONVERGED = Question(
    name="converged",
    text="Does the loop converge?",
    threshold=CONVERGED_STEP,
    relation="at most",
    unit="of the norm",
    reason="a thousandth of the norm is far below what recurrences that still change show",
    figure="steps",
)
DISTINCT = Question(
    name="distinct",
    text="Has each layer its own fixed point?",
    threshold=DISTINCT_COSINE,
    relation="below",
    unit="cosine",
    reason="directions at cosine 0.999 are 2.6 degrees apart: nearer than that, layers share one point",
    figure="trajectory",
)
SETTLED = Question(
    name="attention_settled",
    text="Does attention stop changing, and when?",
    threshold=SETTLED_ENTROPY,
    relation="at most",
    unit="nat",
    reason="a hundredth of a nat is 1 % of the entropy of a row spread over e keys",
    figure="attention_settling",
)
REPEATED = Question(
    name="stages_repeat",
    text="Does every recurrence repeat the stages of attention?",
    threshold=REPEATED_STAGES,
    relation="at least",
    unit="correlation",
    reason="at 0.9 two profiles share four fifths of how they vary over layers",
    figure="stages_repeat",
)
STABLE = Question(
    name="stable",
    text="Is it stable beyond the trained count?",
    threshold=STABLE_GAP,
    relation="at most",
    unit="of the norm",
    reason=f"so far apart are two states of one norm at the cosine {1 - TAU:g} of a fixed point",
    source=PAPERS,
    figure="distance_to_the_fixed_point",
)
