"""The order in which blocks run, and the address that it gives every block invocation.

A schedule is a list of phases. A phase is some blocks that run one after the other; phases may be repeated,
and what is repeated may hold repeated phases again. From the list follow the steps, the loops and the
notation. The paper's (prelude, core x recurrences, coda) is the common case, made by `prelude_core_coda`;
two loops one after the other, or two stacks of which one runs inside the other's loop, are lists as well.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from ...errors import DescriptionError

STAGES = ("prelude", "core", "coda")  # stages of the common case
MAX_NUMBER = 2**15 - 1  # of a layer or a recurrence, which stores keep in two bytes
MAX_DEPTH = 2**16


class Step(NamedTuple):
    """The address of one block invocation."""

    depth: int  # realised depth, from 0
    block: int  # number of its weights in `LoopedModel.blocks`, or among the blocks that are watched
    stage: str  # the phase that it belongs to
    layer: int  # place of the block inside its stage
    recurrence: int  # how many times the block has run before in its loop, from 0; -1 outside of loops


@dataclass(frozen=True)
class Phase:
    """Blocks that run one after the other, under one name."""

    stage: str
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Repeat:
    """Phases that run one after the other, all of them `times` times."""

    parts: tuple["Phase | Repeat", ...]
    times: int


Phases = tuple[Phase | Repeat, ...]


class Loop(NamedTuple):
    """A phase that stands inside a repeat."""

    stage: str
    blocks: tuple[int, ...]
    times: int  # how often each block runs in one forward pass


class Counts(NamedTuple):
    """The numbers of a schedule of the common case; a feedforward model has a core of 0 blocks."""

    prelude: int
    core: int
    recurrences: int
    coda: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases in the order they run.

    Raises:
        DescriptionError: a stage or a block stands in it twice, or a repeat runs less than once.
    """

    phases: Phases

    def __post_init__(self) -> None:
        stages = Counter(phase.stage for phase in _leaves(self.phases))
        blocks = Counter(block for phase in _leaves(self.phases) for block in phase.blocks)
        for what, counts in (("stage", stages), ("block", blocks)):
            if twice := [key for key, count in counts.items() if count > 1]:
                raise DescriptionError(
                    f"{what} {twice[0]!r} stands in more than one phase of {self.notation}"
                )
        if (fewest := min((repeat.times for repeat in _repeats(self.phases)), default=1)) < 1:
            raise DescriptionError(f"a phase of {self.notation} cannot run {fewest} times")

    @cached_property
    def visits(self) -> tuple[tuple[Step, ...], ...]:
        """Returns the steps of every run of a phase, in order; a phase without blocks has no run."""
        visits: list[tuple[Step, ...]] = []
        depth, runs = 0, Counter[str]()
        for phase, is_looped in _unrolled(self.phases):
            recurrence = runs[phase.stage] if is_looped else -1
            addresses = ((layer, block) for layer, block in enumerate(phase.blocks))
            visits.append(
                tuple(
                    Step(depth + layer, block, phase.stage, layer, recurrence) for layer, block in addresses
                )
            )
            runs[phase.stage] += 1
            depth += len(phase.blocks)
        return tuple(visits)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Phases that are repeated, in the order they first run; none in a feedforward model."""
        times = Counter(visit[0].stage for visit in self.visits if visit[0].recurrence >= 0)
        blocks = {phase.stage: phase.blocks for phase in _leaves(self.phases)}
        return tuple(Loop(stage, blocks[stage], count) for stage, count in times.items())

    @property
    def only_loop(self) -> Loop | None:
        """The loop of a schedule that has exactly one."""
        return self.loops[0] if len(self.loops) == 1 else None

    @cached_property
    def last_depths(self) -> frozenset[int]:
        """Depths where a block of a loop runs for the last time."""
        last = {step.block: step.depth for step in self.steps() if step.recurrence >= 0}
        return frozenset(last.values())

    @cached_property
    def num_layers(self) -> dict[str, int]:
        """Blocks of every stage, by its name, in the order of the list; 0 where it has none."""
        return {phase.stage: len(phase.blocks) for phase in _leaves(self.phases)}

    @property
    def num_blocks(self) -> int:
        """Blocks with weights of their own."""
        return sum(self.num_layers.values())

    @property
    def depth(self) -> int:
        """Block invocations of one forward pass."""
        return sum(map(len, self.visits))

    @property
    def notation(self) -> str:
        """Sizes of the phases in order, with x and a count where they repeat: (2,4x32,2) or ((16x3,16)x2)."""
        return _notation(self.phases)

    @property
    def order(self) -> tuple[int, ...]:
        """The block that every step runs."""
        return tuple(step.block for step in self.steps())

    def steps(self) -> Iterator[Step]:
        """Every block invocation in the order they run."""
        return chain.from_iterable(self.visits)

    @cached_property
    def counts(self) -> Counts | None:
        """The numbers of the common case; None for another schedule."""
        match self.phases:
            case (Phase("prelude", before), Phase("core", ()), Phase("coda", after)):
                return Counts(len(before), 0, 0, len(after))
            case (Phase("prelude", before), Repeat((Phase("core", core),), times), Phase("coda", after)):
                return Counts(len(before), len(core), times, len(after))
        return None

    @property
    def prelude(self) -> int:
        """Blocks before the loop; core, coda and this are of the common case alone."""
        return self._common.prelude

    @property
    def core(self) -> int:
        """Blocks inside the loop; 0 in a feedforward model."""
        return self._common.core

    @property
    def recurrences(self) -> int:
        """Times that the only loop runs; 0 where there is none, or several."""
        return self.only_loop.times if self.only_loop else 0

    @property
    def coda(self) -> int:
        """Blocks after the loop."""
        return self._common.coda

    @property
    def _common(self) -> Counts:
        assert self.counts is not None, f"{self.notation} is not of the form (prelude, core, coda)"
        return self.counts


def prelude_core_coda(
    prelude: int, core: int, recurrences: int, coda: int, blocks: Sequence[int] | None = None
) -> Phases:
    """The phases of the common case; without a loop all blocks are prelude or coda.

    Args:
        recurrences: how often the core runs; 0 if and only if there is none.
        blocks: numbers of the blocks in the order they first run; 0, 1, 2, ... if not given.
    Raises:
        DescriptionError: numbers that no loop has.
    """
    if (core == 0) != (recurrences == 0):
        raise DescriptionError(f"a core of {core} layers cannot run {recurrences} times")
    if min(prelude, core, coda) < 0:
        raise DescriptionError(f"({prelude},{core}x{recurrences},{coda}) has no layers")
    depth = prelude + core * recurrences + coda
    if recurrences > MAX_NUMBER or prelude + core + coda > MAX_NUMBER or depth > MAX_DEPTH:
        raise DescriptionError(
            f"({prelude},{core}x{recurrences},{coda}) is {depth:,} blocks one after the other; up to "
            f"{MAX_DEPTH:,} can be recorded, of up to {MAX_NUMBER:,} layers and recurrences"
        )
    blocks = tuple(range(prelude + core + coda) if blocks is None else blocks)
    middle = Phase("core", blocks[prelude : prelude + core])
    return (
        Phase("prelude", blocks[:prelude]),
        Repeat((middle,), recurrences) if core else middle,
        Phase("coda", blocks[prelude + core :]),
    )


def _leaves(parts: Phases) -> Iterator[Phase]:
    for part in parts:
        if isinstance(part, Phase):
            yield part
        else:
            yield from _leaves(part.parts)


def _repeats(parts: Phases) -> Iterator[Repeat]:
    for part in parts:
        if isinstance(part, Repeat):
            yield part
            yield from _repeats(part.parts)


def _unrolled(parts: Phases, is_looped: bool = False) -> Iterator[tuple[Phase, bool]]:
    """Yields phases in the order they run, as often as they run, and whether they stand inside a repeat."""
    for part in parts:
        if isinstance(part, Repeat):
            for _ in range(part.times):
                yield from _unrolled(part.parts, is_looped=True)
        elif part.blocks:
            yield part, is_looped


def _notation(parts: Phases) -> str:
    texts = []
    for part in parts:
        if isinstance(part, Phase):
            texts.append(str(len(part.blocks)))
        else:
            inner = _notation(part.parts)
            texts.append(f"{inner[1:-1] if len(part.parts) == 1 else inner}x{part.times}")
    return f"({','.join(texts)})"
