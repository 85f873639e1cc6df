"""Prints verdicts as text on stdout."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ..analysis.findings import Findings


def print_verdicts(findings: Sequence[Findings]) -> None:
    """Prints the answers of each capture, with the number that each rests on."""
    table = Table("", *(each.label for each in findings), box=None, padding=(0, 2, 0, 0))
    for row in zip(*(each.verdicts for each in findings), strict=True):
        cells = []
        for verdict in row:
            number = "" if verdict.value is None else f", {verdict.value:.2g} {verdict.question.unit}"
            since = f", from recurrence {verdict.recurrence}" if verdict.recurrence is not None else ""
            cells.append(verdict.answer_in_words + number + since)
        table.add_row(row[0].question.text, *cells)
    Console(highlight=False, markup=False).print(table)
