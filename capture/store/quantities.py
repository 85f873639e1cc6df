"""The table of quantities: every named thing a capture can hold, with its axes, unit and meaning.

Names select what is captured, name the arrays of the store, and label plots, so they are written down once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...errors import QuantityError


@dataclass(frozen=True)
class Quantity:
    """One thing that can be captured.

    `axes` are dimensions of the store, `unit` is what an axis label shows, `definition` one line for help and
    reports. A float is NaN where it is not defined, a whole number -1: before `first_recurrence`, which is 0
    or 1 for what only the core has, and -1 where every block has it.
    """

    name: str
    axes: tuple[str, ...]
    group: str
    unit: str
    definition: str
    dtype: str = "float32"
    first_recurrence: int = -1


_DEPTH = ("token", "depth")
_HEAD = ("token", "depth", "head")
_SEQUENCE_HEAD = ("sequence", "depth", "head")
_PAIRS = ("sequence", "depth", "depth_other")  # xarray takes no dimension twice
_RECURRENCE = ("token", "recurrence")  # a dimension of its own; on depth, recurrence is a coordinate

BITS = "BITS of bfloat16, no numbers: "
"""Begins the long_name of an array that holds such bits, where no reader can overlook it."""

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
            first_recurrence=1,
        ),
        Quantity(
            "step_cosine",
            _DEPTH,
            "steps",
            "cosine",
            "cosine of the residual and the same layer's one recurrence earlier; NaN at the first "
            "recurrence and outside the core",
            first_recurrence=1,
        ),
        Quantity(
            "gap_norm",
            _DEPTH,
            "gaps",
            "residual units",
            "L2 distance of the residual to the same layer's after the last recurrence; NaN outside the core",
            first_recurrence=0,
        ),
        Quantity(
            "gap_cosine",
            _DEPTH,
            "gaps",
            "cosine",
            "cosine of the residual and the same layer's after the last recurrence; NaN outside the core",
            first_recurrence=0,
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
            "attention_step",
            _SEQUENCE_HEAD,
            "distances",
            "Frobenius norm",
            "Frobenius distance of the sequence's attention matrix to the same layer's one recurrence "
            "earlier; NaN at the first recurrence and outside the core",
            first_recurrence=1,
        ),
        Quantity(
            "attention_gap",
            _SEQUENCE_HEAD,
            "distances",
            "Frobenius norm",
            "Frobenius distance of the sequence's attention matrix to the same layer's after the last "
            "recurrence; NaN outside the core",
            first_recurrence=0,
        ),
        Quantity(
            "attention_distance",
            _PAIRS,
            "distances",
            "Frobenius norm",
            "Frobenius distance of the attention matrices of two block invocations, mean over heads; on a "
            "GPU not resolved below a hundredth of their norm, as attention_step and attention_gap are",
        ),
        Quantity(
            "residual_similarity",
            _PAIRS,
            "distances",
            "cosine",
            "cosine of the residuals of two block invocations, mean over the sequence's tokens",
        ),
        Quantity(
            "residual_entropy",
            ("sequence", "depth"),
            "distances",
            "nat",
            "matrix-based entropy of the sequence's residuals: of the eigenvalues of their Gram matrix, "
            "normalised to trace 1",
        ),
        Quantity(
            "lens_kl",
            _RECURRENCE,
            "lens",
            "nat",
            "KL divergence of the next-token distribution read from the loop state, from the one read after "
            "the last recurrence",
        ),
        Quantity(
            "lens_entropy",
            _RECURRENCE,
            "lens",
            "nat",
            "entropy of the next-token distribution read from the loop state",
        ),
        Quantity(
            "lens_token",
            _RECURRENCE,
            "lens",
            "token id",
            "likeliest next token read from the loop state",
            dtype="int32",
        ),
        Quantity(
            "exit_probability",
            _RECURRENCE,
            "exit",
            "probability",
            "chance that the model's exit gate leaves the loop after this recurrence; all of them always run",
        ),
        Quantity(
            "state", ("token", "depth_state", "hidden"), "state", "residual units", "the residual itself"
        ),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(q.name for q in QUANTITIES.values() if q.group == group)
    for group in ("residual", "steps", "gaps", "attention", "distances", "lens", "exit")
}
GROUPS["all"] = tuple(name for names in GROUPS.values() for name in names)  # not state, which is large


def resolve_quantities(names: Iterable[str], absent: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Resolves names and groups of quantities into names, each once, in the table's order.

    Args:
        absent: quantities that the model does not have, with the reason; groups leave them out.
    Raises:
        QuantityError: a name is neither a quantity nor a group, the model does not have it, or there is none
            at all.
    """
    names, absent = list(names), absent or {}
    wanted: set[str] = set()
    for name in names:
        if name in GROUPS:
            wanted.update(member for member in GROUPS[name] if member not in absent)
        elif name in absent:
            raise QuantityError(f"{name} cannot be captured: {absent[name]}")
        elif name in QUANTITIES:
            wanted.add(name)
        else:
            raise QuantityError(
                f"{name!r} is not a quantity: choose from {', '.join(QUANTITIES)}, "
                f"or the groups {', '.join(GROUPS)} (all is everything but state)"
            )
    if not wanted:
        reasons = {absent[member] for name in names for member in GROUPS.get(name, ()) if member in absent}
        why = (
            f"{' '.join(names)} holds nothing of this model: {'; '.join(sorted(reasons))}. "
            if reasons
            else ""
        )
        there = ", ".join(name for name in QUANTITIES if name not in absent)
        raise QuantityError(f"no quantity was chosen: {why}name at least one of {there}")
    return tuple(name for name in QUANTITIES if name in wanted)
