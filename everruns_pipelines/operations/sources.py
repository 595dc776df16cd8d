"""How many rows the platform's tables hold, and of when the newest is: cheap at any size."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import LiteralString

import psycopg
from psycopg import sql

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items.assets import SPANS
from everruns_pipelines.operations.diagnosis import Databases
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SOURCES


@dataclass(frozen=True)
class Seen:
    """A source table, as it was seen.

    Args:
        rows: of PostgreSQL's tables what its planner estimates, since counting reads them.
        newest: when the newest row was written; None if there is none, finding it takes long,
            or its time may not be read.
    """

    table: str
    rows: int
    rows_are_estimated: bool
    newest: datetime | None
    at: datetime


def look_at_sources(databases: Databases) -> Iterator[Seen]:
    """Look at the source tables of the parts that are on.

    Raises:
        Refusal: PostgreSQL cannot be reached.
    """
    if "reporting" in databases.parts:
        with databases.reporting.connect() as connection:
            for source in SOURCES:
                yield from (_table(connection, table) for table in source.tables)
    if "items" in databases.parts and databases.clickhouse.is_there():
        try:
            yield _spans(databases.clickhouse)
        except (Refusal, ClickHouseFailure):
            # The diagnosis has said why the spans cannot be read.
            return


def _table(connection: Connection, table: str) -> Seen:
    row = connection.execute(_ROWS, {"table": table}).fetchone()
    # Archived events have an index on when they happened, live ones on when they were written.
    query = sql.SQL(_NEWEST).format(
        column=sql.Identifier("ts" if table == EVENT.archive else "created_at"),
        table=sql.Identifier(table),
        where=sql.SQL("WHERE event_type = ANY (%s)" if table == EVENT.table else ""),
    )
    try:
        with connection.transaction():
            connection.execute("SET LOCAL statement_timeout = '5s'")
            newest = connection.execute(
                query, [_event_types()] if table == EVENT.table else []
            ).fetchone()
    # Nothing else reads this column of events: who may do everything else is not stopped by it.
    except (psycopg.errors.QueryCanceled, psycopg.errors.InsufficientPrivilege):
        newest = None
    return Seen(table, row[0] if row else 0, True, newest[0] if newest else None, datetime.now(UTC))


def _event_types() -> list[str]:
    """Those that the index on events is of."""
    parts = [part for fact in FACTS for part in fact.projections]
    return sorted({event_type for part in parts for event_type in part.event_types})


def _spans(clickhouse: ClickHouseDatabase) -> Seen:
    database, _, table = clickhouse.settings.spans_table.rpartition(".")
    with clickhouse.connect(patience=5.0) as opened:
        [[rows, newest]] = opened.rows(
            "SELECT count() AS rows, toUnixTimestamp(max(Timestamp)) AS newest"
            " FROM {database:Identifier}.{spans:Identifier}",
            {"database": database or opened.database, "spans": table},
            ["rows", "newest"],
        )
    seen = datetime.fromtimestamp(int(newest), UTC) if int(rows) else None
    return Seen(SPANS, int(rows), False, seen, datetime.now(UTC))


# The estimate of a table that was never analyzed is -1; a partitioned one is the sum of its parts.
_ROWS: LiteralString = """
SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint
FROM pg_class
WHERE relkind = 'r' AND oid IN (
    SELECT to_regclass(%(table)s)
    UNION ALL
    SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))
)
"""

# In times that Python's calendar has.
_NEWEST: LiteralString = """
SELECT CASE WHEN newest IS NOT NULL THEN greatest('0001-01-02Z', least('9999-12-30Z', newest)) END
FROM (SELECT max({column}) AS newest FROM {table} {where}) AS found
"""
