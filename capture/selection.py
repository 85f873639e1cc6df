"""Reads selections of block invocations, by stage, layer and recurrence, and of tokens, by position."""

import re
from collections.abc import Sequence

import numpy as np

from ..errors import NoSuchDepthError, SelectionError
from .models.loop_schedule import STAGES, Schedule
from .models.tap import Half

_STATES = re.compile(r"(\w+)(?:\[([^\]]*)\])?(?:@(.+))?")
_RANGE = re.compile(r"(-?\d+)-(\d+)")


def select_depths(states: Sequence[str], schedule: Schedule) -> tuple[int, ...]:
    """Returns the depths named by selections such as `all`, `core[-1]@0,1,last`, `prelude[all]`, in order,
    each once.

    Args:
        states: selections, added together. Layers and recurrences are numbers, from the end if negative,
            ranges 0-3, `last` or `all`, with commas; both default to all.
    Raises:
        SelectionError: not of that form, or nothing in this model; says what there is.
    """
    steps = list(schedule.steps())
    times = {loop.stage: loop.times for loop in schedule.loops}
    chosen: set[int] = set()
    for text in states:
        if text == "all":
            chosen.update(range(len(steps)))
            continue
        match = _STATES.fullmatch(text)
        if match is None or match[1] not in (*STAGES, *schedule.num_layers):
            raise SelectionError(
                f"states {text!r}: write all or STAGE[LAYERS]@RECURRENCES, for example core[-1]@0,1,last"
            )
        stage, layers, recurrences = match.groups()
        if not (num_layers := schedule.num_layers.get(stage, 0)):
            raise NoSuchDepthError(f"states {text!r}: {schedule.notation} has no {stage}")
        if recurrences is not None and stage not in times:
            looped = " and ".join(times) or "core"
            have = "have" if len(times) > 1 else "has"
            raise NoSuchDepthError(
                f"states {text!r}: only the {looped} {have} recurrences, the {stage} runs once"
            )
        wanted_layers = _numbers("all" if layers is None else layers, num_layers, f"layers of the {stage}")
        wanted_recurrences = _numbers(recurrences or "all", times.get(stage, 1), "recurrences")
        chosen.update(
            step.depth
            for step in steps
            if step.stage == stage
            and step.layer in wanted_layers
            and (stage not in times or step.recurrence in wanted_recurrences)
        )
    return tuple(sorted(chosen))


def select_halves(zero: Sequence[str], schedule: Schedule) -> frozenset[tuple[int, Half]]:
    """Returns halves of block invocations, (depth, half), named by selections such as `mlp:core[1]@0`.

    Raises:
        SelectionError: not of that form, or nothing in this model; says what there is.
    """
    halves: dict[str, Half] = {"mlp": "mlp", "attention": "attention"}
    chosen: set[tuple[int, Half]] = set()
    for text in zero:
        half, colon, states = text.partition(":")
        if half not in halves or not colon:
            raise SelectionError(
                f"zero {text!r}: write mlp:STAGE[LAYERS]@RECURRENCES or attention:STAGE..., "
                "for example mlp:core[1]"
            )
        try:
            depths = select_depths([states], schedule)
        except SelectionError as error:
            raise type(error)(f"zero {text!r}: after the colon, {error}") from error
        chosen.update((depth, halves[half]) for depth in depths)
    return frozenset(chosen)


def select_tokens(tokens: str, seed: int, sequence_id: int, length: int) -> np.ndarray:
    """Returns the positions of one sequence whose states are kept, int64, in order.

    Args:
        tokens: `all`, `last`, `every:8` (positions 0, 8, 16, ...) or `sample:0.05` (each with that chance,
            the same for the same seed, sequence and position whatever else is captured).
    """
    kind, _, argument = tokens.partition(":")
    if tokens == "all":
        return np.arange(length)
    if tokens == "last":
        return np.arange(length)[-1:]
    if kind == "every" and argument.isdecimal() and int(argument) > 0:
        return np.arange(0, length, int(argument))
    if kind == "sample" and (share := _share(argument)) is not None:
        # a key of its own, so that the sample is independent of the initial states' draw
        generator = np.random.Generator(np.random.Philox(key=[seed, sequence_id], counter=[0, 0, 0, 1]))
        return np.flatnonzero(generator.random(length) < share)
    raise SelectionError(
        f"tokens {tokens!r}: choose all, last, every:NUMBER or sample:SHARE with a share above 0 up to 1"
    )


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def _numbers(text: str, count: int, what: str) -> set[int]:
    """Returns the whole numbers below `count` that a list such as `0,2-4,-1,last` names."""
    chosen: set[int] = set()
    for item in text.split(","):
        if item == "all":
            chosen.update(range(count))
            continue
        if match := _RANGE.fullmatch(item):
            first, last = int(match[1]), int(match[2])
        elif item == "last":
            first = last = count - 1
        elif re.fullmatch(r"-?\d+", item):
            first = last = int(item) + (count if int(item) < 0 else 0)
        else:
            raise SelectionError(f"{item!r} is no number, range, last or all among the {what}")
        if not 0 <= first <= last < count:
            raise NoSuchDepthError(f"{item} is not among the {what}, which are 0 to {count - 1}")
        chosen.update(range(first, last + 1))
    return chosen
