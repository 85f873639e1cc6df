"""The number of recurrences a model was trained with, as far as captures tell."""

from collections.abc import Sequence

from ..capture.store.plan import StoredPlan


def trained_count(plan: StoredPlan, others: Sequence[StoredPlan] = ()) -> int | str:
    """Returns the recurrences that a capture's model was trained with, or why they are not known.

    A plan names its own count and not the checkpoint's: it is the checkpoint's where no other was asked for,
    in this capture or in one of the same weights. A window of layers that was made a loop was trained to run
    once.

    Args:
        plan: plan of the capture.
        others: plans of captures beside it.
    """
    if not plan.model.core:
        return "the model has no loop"
    if plan.model.is_random:
        return "the weights are random: no recurrence was trained"
    if plan.settings.loop:
        return 1
    for each in (plan, *others):
        same = each is plan or same_weights(each, plan)
        if same and not each.settings.recurrences and not each.settings.loop:
            return each.model.recurrences
    return (
        "a capture does not hold how many recurrences the model was trained with: "
        "report it beside a capture of the same model without --recurrences"
    )


def same_weights(plan: StoredPlan, other: StoredPlan) -> bool:
    """Whether two captures are known to be of the same weights."""
    return plan.model.weights_sha256 == other.model.weights_sha256 is not None
