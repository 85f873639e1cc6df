"""The table of quantities: every named thing a capture can hold, with its axes, unit and meaning.

Names select what is captured, name the arrays of the store, and label plots, so they are written down once.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """One thing that can be captured.

    `axes` are dimensions of the store, `unit` is what an axis label shows, `definition` one line for help and
    reports.
    """

    name: str
    axes: tuple[str, ...]
    group: str
    unit: str
    definition: str


_DEPTH = ("token", "depth")
_HEAD = ("token", "depth", "head")

QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity("residual_norm", _DEPTH, "residual", "residual units", "L2 norm of the residual"),
        Quantity(
            "residual_peak", _DEPTH, "residual", "residual units", "largest absolute channel of the residual"
        ),
        Quantity(
            "update_norm",
            _DEPTH,
            "residual",
            "residual units",
            "L2 norm of what the block added: residual after it minus residual before it",
        ),
        Quantity(
            "step_norm",
            _DEPTH,
            "steps",
            "residual units",
            "L2 distance of the residual to the same layer's one recurrence earlier; NaN at the first "
            "recurrence and outside the core",
        ),
        Quantity(
            "step_cosine",
            _DEPTH,
            "steps",
            "cosine",
            "cosine of the residual and the same layer's one recurrence earlier; NaN at the first "
            "recurrence and outside the core",
        ),
        Quantity(
            "gap_norm",
            _DEPTH,
            "gaps",
            "residual units",
            "L2 distance of the residual to the same layer's after the last recurrence; NaN outside the core",
        ),
        Quantity(
            "gap_cosine",
            _DEPTH,
            "gaps",
            "cosine",
            "cosine of the residual and the same layer's after the last recurrence; NaN outside the core",
        ),
        Quantity(
            "attention_entropy",
            _HEAD,
            "attention",
            "nat",
            "entropy of the token's attention row; its mean over a sequence is the mixing score",
        ),
        Quantity(
            "attention_peak", _HEAD, "attention", "probability", "largest weight of the token's attention row"
        ),
        Quantity(
            "attention_sink",
            _HEAD,
            "attention",
            "probability",
            "attention paid to the first sink_tokens keys of the sequence; its mean is the sink score",
        ),
        Quantity(
            "attention_received",
            _HEAD,
            "attention",
            "queries",
            "attention the token receives as a key, summed over all queries of its sequence",
        ),
        Quantity(
            "state", ("token", "depth_state", "hidden"), "state", "residual units", "the residual itself"
        ),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(q.name for q in QUANTITIES.values() if q.group == group)
    for group in ("residual", "steps", "gaps", "attention")
}
GROUPS["all"] = tuple(name for names in GROUPS.values() for name in names)  # not state, which is large


def resolve_quantities(names: Iterable[str]) -> tuple[str, ...]:
    """Names and groups of quantities -> names of quantities, each once, in the table's order.

    Raises:
        ValueError: a name is neither a quantity nor a group, or there is none at all.
    """
    wanted: set[str] = set()
    for name in names:
        if name in GROUPS:
            wanted.update(GROUPS[name])
        elif name in QUANTITIES:
            wanted.add(name)
        else:
            raise ValueError(
                f"{name!r} is not a quantity: choose from {', '.join(QUANTITIES)}, "
                f"or the groups {', '.join(GROUPS)} (all is everything but state)"
            )
    if not wanted:
        raise ValueError(f"no quantity was chosen: name at least one of {', '.join(QUANTITIES)}")
    return tuple(name for name in QUANTITIES if name in wanted)
