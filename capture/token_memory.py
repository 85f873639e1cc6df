"""Bytes that a token of a batch keeps in memory for steps, gaps, the lens and maps of pairs of blocks."""

from collections.abc import Collection

from .models.description import Description
from .store.quantities import GROUPS


def itemsize_of(dtype: str) -> int:
    """Bytes of one number of a dtype that a model runs in."""
    return 4 if dtype == "float32" else 2


def kept_bytes(d: Description, quantities: Collection[str], dtype: str, *, last_only: bool = False) -> int:
    """Bytes that wait for the last recurrence: what blocks of loops leave for the gaps, their attention
    patterns for attention_gap, the loop state for the lens.

    Args:
        last_only: counts the last recurrence alone, which a first run of two leaves behind.
    """
    states = sum(1 if last_only else loop.times for loop in d.loops) if "lens_kl" in quantities else 0
    steps = sum(len(loop.blocks) * (1 if last_only else loop.times) for loop in d.loops)
    if any(name in GROUPS["gaps"] for name in quantities):
        states += steps
    patterns = steps if "attention_gap" in quantities else 0
    return states * d.width * itemsize_of(dtype) + patterns * _pattern_bytes(d, dtype)


def before_bytes(d: Description, quantities: Collection[str], dtype: str) -> int:
    """Bytes that the recurrence before left, which steps are measured from."""
    states = d.width * itemsize_of(dtype) if any(name in GROUPS["steps"] for name in quantities) else 0
    patterns = _pattern_bytes(d, dtype) if "attention_step" in quantities else 0
    return sum(len(loop.blocks) for loop in d.loops) * (states + patterns)


def map_bytes(d: Description, quantities: Collection[str], dtype: str) -> int:
    """Bytes kept at every depth for the maps of all pairs of block invocations."""
    patterns = _pattern_bytes(d, dtype) if "attention_distance" in quantities else 0
    states = d.width * itemsize_of(dtype) if "residual_similarity" in quantities else 0
    return d.depth * (patterns + states)


def _pattern_bytes(d: Description, dtype: str) -> int:
    """Bytes of one token in one attention pattern: its queries, its keys, the row's sum."""
    return (d.num_heads + d.num_kv_heads) * d.head_width * itemsize_of(dtype) + 4 * d.num_heads
