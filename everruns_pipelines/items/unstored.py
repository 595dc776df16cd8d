"""Finds items that spans reported and nobody stored: the direct POST failed, or never happened."""

from collections.abc import Sequence
from dataclasses import dataclass

from everruns_pipelines.databases.clickhouse import ClickHouse
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.items.database import ensure_schema
from everruns_pipelines.items.scope import know_projects
from everruns_pipelines.items.span_table import SpanTable

# Reported items looked at in one go.
MOST_REPORTED = 5000


@dataclass(frozen=True)
class Reported:
    """Items that spans reported which ended between two times.

    Args:
        rows: trace, project as the span names it, dedupe key, end in seconds since the epoch.
        until: the end of what was looked at.
        is_cut: there was too much for one go, and `until` is earlier than asked.
    """

    rows: Sequence[Sequence[str]]
    until: int
    is_cut: bool


@dataclass(frozen=True)
class Unstored:
    """An envelope without an item. Organization, workspace and project are UUIDs."""

    organization: str
    workspace: str
    project: str
    trace_id: str
    dedupe_key: str
    ended: int


def find_reported(clickhouse: ClickHouse, table: str, since: int, until: int) -> Reported:
    """The first `MOST_REPORTED` items of spans that ended after `since`, up to and with `until`.

    Args:
        table: the span table, database-qualified if need be.
        since: like `until` in whole seconds since the epoch.

    Raises:
        Refusal: there is no such table.
        ClickHouseFailure: ClickHouse cannot be asked.
    """
    rows = SpanTable(clickhouse, table).reported(since, until, MOST_REPORTED)
    if len(rows) < MOST_REPORTED:
        return Reported(rows, until, is_cut=False)
    # What ended in the last second may have been cut: the next look begins before it.
    return Reported(rows, max(since + 1, int(rows[-1][3]) - 1), is_cut=True)


def find_unstored(connection: Connection, reported: Reported) -> list[Unstored]:
    """Which of the reported items of known projects are neither stored nor rejected.

    Raises:
        psycopg.Error: the tables cannot be read.
    """
    ensure_schema(connection)
    know_projects(connection, None)
    traces, projects, keys, ended = zip(*reported.rows, strict=True)
    rows = connection.execute(
        read_sql("everruns_pipelines.items", "unstored.sql"),
        {
            "traces": list(traces),
            "projects": list(projects),
            "keys": list(keys),
            "ended": [int(seconds) for seconds in ended],
        },
    )
    return [Unstored(*row) for row in rows]
