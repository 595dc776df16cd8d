"""How a measure is told: what it is, what was measured, and what is wanted."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str]


def show(title: str, *parts: Iterable[Row]) -> None:
    """Print the rows of all parts, once all are measured."""
    table = Table("what", "measured", "target", title=title)
    for part in parts:
        for row in part:
            table.add_row(*row)
    Console(width=110).print(table)
