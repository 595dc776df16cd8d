"""Batches: what one transaction writes, done again if another writer came between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import LiteralString, TypeVar

from psycopg import errors
from psycopg.rows import class_row

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_sql

BATCH_SIZE = 5000

_ATTEMPTS = 5
_COLLISIONS = (
    errors.UniqueViolation,
    errors.ForeignKeyViolation,
    errors.DeadlockDetected,
    errors.SerializationFailure,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A range of chosen candidates, of one round or, where that is None, of those with links."""

    round: int | None
    first: int
    last: int


def batches(connection: Connection, number: int | None) -> list[Batch]:
    """The batches of a round, or of all that name links where `number` is None."""
    cursor = connection.cursor(row_factory=class_row(Batch))
    query = read_sql("everruns_pipelines.items", "batches.sql")
    return cursor.execute(query, {"size": BATCH_SIZE, "round": number}).fetchall()


def undisturbed(action: Callable[[], T], look_again: Callable[[], object]) -> T:
    """What a transaction returns; it is done again if another writer came between."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return action()
        except _COLLISIONS:
            look_again()
    return action()


def tally(connection: Connection, query: LiteralString) -> dict[str, int]:
    """What a query of names and numbers counts."""
    return dict(connection.execute(query).fetchall())
