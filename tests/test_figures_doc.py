"""docs/figures.md names every figure that is drawn, and answers to every figure of the paper that it must."""

import re
from pathlib import Path

from looptap.analysis.figures.catalogue import FIGURES
from looptap.analysis.studies import architecture_figures, boundary_figures, depth_figures

TEXT = (Path(__file__).parents[1] / "docs" / "figures.md").read_text()
STUDIES = (
    architecture_figures.distance_by_recurrence,
    boundary_figures.convergence_map,
    boundary_figures.convergence_boundary,
    depth_figures.stages_by_count,
    depth_figures.ends_by_count,
)
ASKED = {*range(2, 53), 63}  # 2 to 12, 13 to 18, 19 to 31, 32 and 33, 34 to 52, 63


def numbers_in(text: str) -> set[int]:
    """Figure numbers in words such as "7, 8, 34 to 46"."""
    found = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_every_figure_is_named_and_no_other():
    known = {draw.__name__ for draw in (*FIGURES, *STUDIES)}
    named = set(re.findall(r"`([a-z_]+)`", TEXT))
    assert known <= named
    cells = [cell for row in TEXT.splitlines() if row.startswith("|") for cell in row.split("|")[2:-2]]
    drawn = {name for cell in cells for name in re.findall(r"`([a-z]+_[a-z_]+)`", cell)}
    assert drawn - known <= {"limits_together"}  # a table


def test_every_figure_of_the_paper_is_answered_to_once():
    rows = [row.split("|")[1] for row in TEXT.splitlines() if re.match(r"\| \d", row)]
    numbers = [number for row in rows for number in sorted(numbers_in(row))]
    assert sorted(numbers) == sorted(ASKED)


def test_figures_say_the_numbers_that_the_page_gives_them():
    rows = [row.split("|") for row in TEXT.splitlines() if re.match(r"\| \d", row)]
    here = {name: numbers_in(row[1]) for row in rows for name in re.findall(r"`([a-z_]+)`", row[3])}
    for draw in (*FIGURES, *STUDIES):
        assert draw.__doc__ is not None
        said = re.search(r"\((?!beyond)[^)]*?figures?\s+([\d, andto]+)", draw.__doc__)
        assert not said or numbers_in(said[1]) & here[draw.__name__], draw.__name__
        assert said or draw.__name__ not in here, draw.__name__
