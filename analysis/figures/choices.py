"""Choices of a page's reader, and the expressions by which a figure follows them.

A choice is a whole number that stands in a figure's specification as the parameter `chosen_<name>`, and -1
stands for all of them, which is what pictures show. The page has one control for each name in `EVERYWHERE`,
which all figures follow; other choices are a figure's own. A choice that needs other axes, as a measure does,
is answered by another panel in the same place (`Panel.instead`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt

ALL = -1
EVERYWHERE = ("layer", "recurrence")  # what the page lets a reader choose once for all figures
FADED = 0.1  # share of its opacity that what is not chosen keeps: still seen, no longer in the way


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A control of a figure or of a page: what it chooses, and the text of each value; the first is shown."""

    name: str
    label: str
    options: Mapping[str, str]


def chosen(name: str) -> str:
    """The parameter that holds a choice."""
    return f"chosen_{name}"


def is_shown(*names: str) -> str:
    """Returns an expression: nothing is chosen, or the datum is of what is chosen."""
    return " && ".join(f"({chosen(n)} == {ALL} || datum.{n} == {chosen(n)})" for n in names)


def is_picked(*names: str) -> str:
    """Returns an expression: something is chosen, and the datum is of it."""
    some = " || ".join(f"{chosen(n)} != {ALL}" for n in names)
    return f"({some}) && {is_shown(*names)}"


def fading(opacity: float, *names: str) -> Any:
    """Opacity of a mark that fades while something else is chosen."""
    return alt.condition(is_shown(*names), alt.value(opacity), alt.value(FADED * opacity))


def parameters(defaults: Mapping[str, int]) -> list[alt.VariableParameter]:
    """Returns the parameters of these choices, with their first values."""
    return [alt.VariableParameter(name=chosen(name), value=value) for name, value in defaults.items()]


def numbered(name: str, num_values: int) -> Choice:
    """A choice among layers, recurrences or heads, which are counted from 0."""
    options = {str(ALL): "all"} | {str(index): str(index) for index in range(num_values)}
    return Choice(name=name, label=name.capitalize(), options=options)
