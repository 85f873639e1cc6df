"""The loop of a module, read off the order in which its blocks were called in one forward pass."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..models.description import Step
from .errors import WatchError

_SHOWN = 12  # how many calls an error lists


@dataclass(frozen=True)
class Structure:
    """Blocks before, inside and after the loop, and how often the loop ran; no loop is all prelude."""

    prelude: int
    core: int
    recurrences: int
    coda: int
    order: tuple[int, ...]
    """Which block each invocation called, by its place among the watched ones."""

    @property
    def depth(self) -> int:
        """Block invocations of one forward pass."""
        return len(self.order)

    @property
    def notation(self) -> str:
        """The paper's, without injection, which cannot be seen from outside."""
        core = f"{self.core}x{self.recurrences}" if self.core else "0"
        return f"({self.prelude},{core},{self.coda})"

    def steps(self) -> Iterator[Step]:
        """Every block invocation in the order they ran."""
        end = self.prelude + self.core * self.recurrences
        for depth in range(self.depth):
            if depth < self.prelude:
                yield Step(depth, "prelude", depth, -1)
            elif depth < end:
                recurrence, layer = divmod(depth - self.prelude, self.core)
                yield Step(depth, "core", layer, recurrence)
            else:
                yield Step(depth, "coda", depth - end, -1)


def find_structure(order: Sequence[int], names: Sequence[str]) -> Structure:
    """Prelude: the blocks called once before the first that is called again. Core: the cycle that repeats.

    Args:
        order: which block each invocation called.
        names: of the blocks, for the error.
    Raises:
        WatchError: the repeated calls are not one cycle in the same order each time.
    """
    calls = Counter(order)
    if max(calls.values()) == 1:
        return Structure(len(order), 0, 0, 0, tuple(order))
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
    return Structure(prelude, core, recurrences, len(tail), tuple(order))


def show_order(order: Sequence[int], names: Sequence[str]) -> str:
    """The calls in order, shortened."""
    shown = ", ".join(names[block] for block in order[:_SHOWN])
    return f"{shown}, … ({len(order)} calls)" if len(order) > _SHOWN else f"{shown} ({len(order)} calls)"
