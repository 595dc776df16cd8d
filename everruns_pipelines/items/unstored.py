"""Finds items that spans reported and nobody stored: the direct POST failed, or never happened.

Reported items have an order, by the end of their span first. A look begins behind a position in
it and says how far it came, so that one look after the other sees every item once.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.database import ensure_schema
from everruns_pipelines.items.reading import copy
from everruns_pipelines.items.scope import know_projects
from everruns_pipelines.items.span_table import Position, SpanTable

_SQL = read_statements("everruns_pipelines.items", "unstored.sql")

# What one look reads at most: a look a minute keeps up with two thousand reports a second, and the
# three looks of a tick have an end long before its time is over.
MOST_REPORTED = 150_000
# Only these come into the memory of this process.
MOST_UNSTORED = 100_000


@dataclass(frozen=True)
class Unstored:
    """An envelope without an item. Organization, workspace and project are UUIDs."""

    organization: str
    workspace: str
    project: str
    position: Position

    @property
    def trace_id(self) -> str:
        """The trace that reported it."""
        return self.position.trace_id

    @property
    def ended(self) -> int:
        """When its span ended, in whole seconds since the epoch."""
        return self.position.ended_ns // 1_000_000_000


@dataclass(frozen=True)
class Look:
    """What a look at reported items found.

    Args:
        seen: how many items were looked at.
        reached: how far it came; the next look begins there.
    """

    unstored: Sequence[Unstored]
    seen: int
    reached: Position


@dataclass(frozen=True)
class Watch:
    """Looks at what spans reported, on one connection to each database."""

    connection: Connection
    table: SpanTable

    @classmethod
    @contextmanager
    def opened(
        cls, postgres: PostgresDatabase, clickhouse: ClickHouseDatabase, within: float
    ) -> Generator[Self]:
        """Ready to look.

        Args:
            within: seconds for connecting and for all looks.

        Raises:
            Refusal: a table is missing, a database cannot be reached or has not answered in time,
                or the embedded ClickHouse is in use.
            ClickHouseFailure: ClickHouse cannot be asked, or not in time.
            psycopg.Error: PostgreSQL cannot be asked.
        """
        with postgres.connect(within=within) as connection:
            ensure_schema(connection)
            know_projects(connection, None)
            connection.execute(_SQL["stage"])
            # Another run that reads the embedded engine is hardly worth waiting for.
            with clickhouse.connect(patience=within / 4, within=within) as opened:
                yield cls(connection, SpanTable.of(opened, clickhouse.settings.spans_table))

    def look(self, after: Position, until: Position) -> Look:
        """Look at the items of spans behind a position that ended until another one did."""
        if after >= until:
            return Look([], 0, until)
        self.connection.execute("TRUNCATE reported")
        query = self.table.reported(after, until.ended_ns, MOST_REPORTED)
        copy(self.connection, _SQL["copy"], self.table.clickhouse.stream(*query))
        self.connection.execute("ANALYZE reported")
        last = self.connection.execute(_SQL["last"]).fetchone()
        rows = self.connection.execute(_SQL["unstored"], {"most": MOST_UNSTORED}).fetchall()
        seen: int = 0 if last is None else last[0]
        unstored = [Unstored(row[0], row[1], row[2], _position(row[3:])) for row in rows]
        if len(unstored) == MOST_UNSTORED:
            reached = unstored[-1].position
        elif last is not None and seen == MOST_REPORTED:
            reached = _position(last[1:])
        else:
            # Behind all that ended in that nanosecond.
            reached = Position(until.ended_ns + 1)
        return Look(unstored, seen, reached)


def _position(row: Sequence[Any]) -> Position:
    ended_ns, trace_id, project, dedupe_key = row
    return Position(ended_ns, trace_id, project, dedupe_key)
