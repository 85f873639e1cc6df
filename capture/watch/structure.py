"""Finds the loop of a module from the order in which its blocks were called in one forward pass."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from ...errors import WatchError
from ..models.loop_schedule import Schedule, prelude_core_coda

_SHOWN = 12  # how many runs of calls an error lists


def find_structure(order: Sequence[int], names: Sequence[str]) -> Schedule:
    """Returns the loop as it was seen; injection cannot be seen from outside.

    The prelude are the blocks called once before the first that is called again, the core is the cycle that
    repeats, the coda what follows it.

    Args:
        order: block that each invocation called, by its place among the watched ones.
        names: names of the blocks, for the error.
    Raises:
        WatchError: the repeated calls are not one cycle in the same order each time.
    """
    calls = Counter(order)
    if max(calls.values()) == 1:
        return Schedule(phases=prelude_core_coda(len(order), 0, 0, 0, order))
    prelude = next(index for index, block in enumerate(order) if calls[block] > 1)
    first = order[prelude]
    core, recurrences = order.index(first, prelude + 1) - prelude, calls[first]
    end = prelude + core * recurrences
    cycle, tail = tuple(order[prelude : prelude + core]), order[end:]
    if tuple(order[prelude:end]) != cycle * recurrences or any(calls[block] > 1 for block in tail):
        raise WatchError(
            "the blocks that are called repeatedly are not one cycle, called in the same order each time: "
            f"{show_order(order, names)}; name the blocks of one loop only, without those inside or around "
            "it that run at another rhythm"
        )
    blocks = (*order[: prelude + core], *tail)
    return Schedule(phases=prelude_core_coda(prelude, core, recurrences, len(tail), blocks))


def show_order(order: Sequence[int], names: Sequence[str]) -> str:
    """Returns the calls in order as short text: blocks that count up as one run, equal runs with a number."""
    runs: list[tuple[str, int, int]] = []  # the name before its number, first and last number
    for block in order:
        stem, _, number = names[block].rpartition(".")
        here = (stem, int(number), int(number)) if number.isdecimal() else (names[block], -1, -1)
        if runs and here[1] >= 0 and here[:2] == (runs[-1][0], runs[-1][2] + 1):
            runs[-1] = (stem, runs[-1][1], here[1])
        else:
            runs.append(here)
    texts = [
        (f"{stem}." if stem else "") + (f"{first}-{last}" if last > first else f"{first}")
        if first >= 0
        else stem
        for stem, first, last in runs
    ]
    counted = [(text, len(list(equal))) for text, equal in groupby(texts)]
    shown = ", ".join(f"{text} x{count}" if count > 1 else text for text, count in counted[:_SHOWN])
    return f"{shown}{', …' if len(counted) > _SHOWN else ''} ({len(order)} calls)"
