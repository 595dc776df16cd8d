"""How a measure is told: what it is, what was measured, what is wanted, and whether that is met."""

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str, str]


def show(rows: Iterable[Row]) -> None:
    table = Table("what", "measured", "target", "met")
    for one in rows:
        table.add_row(*one)
    Console(width=110).print(table)


@contextmanager
def timed() -> Generator[Callable[[], float]]:
    start = time.perf_counter()
    end: list[float] = []
    yield lambda: end[0]
    end.append(time.perf_counter() - start)


def row(what: str, measured: float, target: float, *, below: bool = False) -> Row:
    met = measured <= target if below else measured >= target
    sign = "at most" if below else "at least"
    return what, f"{measured:.3g}", f"{sign} {target:g}", "yes" if met else "NO"
