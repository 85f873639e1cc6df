"""Our thresholds, from which on something counts as converged, settled, distinct, repeated, or as rounding.

Verdicts, figures, rates and the command line take them from here. The paper's own stand beside what they
belong to (`answers.limits`, `measures.SINK_SCORE`).
"""

# a step of a thousandth of the norm is far below what recurrences that still change show, and well above
# the 3e-7 where rounding stops a converged loop in float32
CONVERGED_STEP = 1e-3
# two directions at cosine 0.999 are 2.6 degrees apart: nearer than that, layers share one point
DISTINCT_COSINE = 0.999
# one hundredth of a nat is 1 % of the entropy of a row spread over e keys: no eye sees it in an attention map
SETTLED_ENTROPY = 0.01
# a profile shares the square of its correlation with another: four fifths of how it varies over layers
REPEATED_STAGES = 0.9
# machine epsilons of the norm that rounding may move a loop at its fixed point by: 1.3 to 2.7 were seen, in
# float32 and bfloat16 with pre and Huginn norms (12 layers)
ROUNDING_STEPS = 4
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def rounding_step(epsilon: float) -> float:
    """Returns how far rounding alone may move a loop at its fixed point, as a share of the norm.

    Args:
        epsilon: machine epsilon of the dtype that the loop runs in.
    """
    return ROUNDING_STEPS * epsilon
