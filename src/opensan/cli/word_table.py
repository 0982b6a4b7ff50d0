"""Make the table of words for a terminal."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 25
"""Most rows, so that the table fits a terminal; the files have the rest."""


def word_table(
    areas: Mapping[str, float],
    unlabelled: float,
    column: str | None = None,
    cell: Callable[[str | None, float], str] | None = None,
) -> "Table":
    """Return a table of the words that occur, largest first, then the unlabelled share.

    Args:
        areas: each word's share of the pixels, in [0, 1].
        unlabelled: the share of those without a word.
        column: the heading of one more column; None for none.
        cell: what stands there for a word (None in lines about anything else) and its share.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from opensan.outputs import format_share

    table = Table(box=box.SIMPLE)
    table.add_column("word")
    table.add_column("area", justify="right")
    if column is not None:
        table.add_column(column, justify="right")

    def add(line: str, name: str | None, area: float) -> None:
        table.add_row(Text(line), format_share(area), *([cell(name, area)] if cell is not None else []))

    occurring = sorted(((name, area) for name, area in areas.items() if area > 0), key=lambda word: -word[1])
    for name, area in occurring[:ROWS]:
        add(name, name, area)
    if len(occurring) > ROWS:
        add(f"and {len(occurring) - ROWS} more", None, sum(area for _, area in occurring[ROWS:]))
    if unlabelled:
        add("unlabelled", None, unlabelled)
    return table
