"""Counts numbers that are infinite or undefined where a number is due, for the receipt of a unit."""

from collections.abc import Iterable

from torch import Tensor

from ..models.loop_schedule import Step
from ..store.quantities import QUANTITIES


def count_non_finite(name: str, values: Tensor, steps: Iterable[Step]) -> int:
    """Returns how many numbers of a quantity are infinite or NaN, except where it is not defined.

    Args:
        name: name of the quantity.
        values: its filled slots, [token or sequence, depth or recurrence, ...].
        steps: steps of the schedule that it was measured along.
    """
    quantity = QUANTITIES[name]
    if not values.is_floating_point():
        return 0
    if quantity.axes[1] == "depth":
        values = values[:, [step.depth for step in steps if step.recurrence >= quantity.first_recurrence]]
    return int((~values.isfinite()).sum())
