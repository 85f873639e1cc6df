"""The number of recurrences a model was trained with, as far as captures tell."""

from collections.abc import Mapping, Sequence
from typing import Any


def trained_count(plan: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> int | str:
    """Returns the recurrences that a capture's model was trained with, or why they are not known.

    A plan names its own count and not the checkpoint's: it is the checkpoint's where no other was asked for,
    in this capture or in one of the same weights. A window of layers that was made a loop was trained to run
    once.

    Args:
        plan: of the capture.
        others: plans of captures beside it.
    """
    model = plan["model"]
    if not model["core"]:
        return "the model has no loop"
    if str(model.get("spec") or model["name"]).startswith("random:"):
        return "the weights are random: no recurrence was trained"
    if plan["settings"].get("loop"):
        return 1
    for each in (plan, *others):
        same = each is plan or same_weights(each, plan)
        if same and not each["settings"].get("recurrences") and not each["settings"].get("loop"):
            return int(each["model"]["recurrences"])
    return (
        "a capture does not hold how many recurrences the model was trained with: "
        "report it beside a capture of the same model without --recurrences"
    )


def same_weights(plan: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two captures are known to be of the same weights."""
    hashes = {each["model"].get("weights_sha256") for each in (plan, other)}
    return len(hashes) == 1 and None not in hashes
