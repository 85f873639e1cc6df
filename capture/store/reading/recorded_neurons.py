"""What a plan holds of its model's neurons, for who reads a store without the model."""

from typing import Any

from ....errors import NoNeuronsError


def recorded_neurons(plan: dict[str, Any]) -> dict[str, Any]:
    """Shares and kurtosis by block, as `capture.probes.neurons.summarise` gave them when the store was made.

    Raises:
        NoNeuronsError: none were recorded.
    """
    model = plan["model"]
    if "neurons" in model:
        return model["neurons"]
    if model["norm"] == "unknown":
        raise NoNeuronsError(
            "the module was watched: which of its weights an MLP writes with, and which are its head, cannot "
            "be seen from outside"
        )
    raise NoNeuronsError(
        "not asked for when the store was made: capture into a new store with --neurons, or see the model's "
        "with looptap info MODEL --neurons"
    )
