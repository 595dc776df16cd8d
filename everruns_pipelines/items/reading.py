"""From ClickHouse into staging: the selected spans' bytes, straight into COPY."""

from collections.abc import Callable, Iterable, Sequence
from typing import LiteralString

import psycopg

from everruns_pipelines.databases.clickhouse import (
    ClickHouseDatabase,
    ClickHouseFailure,
    Log,
    retrying,
)
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.span_table import Selection, SpanTable

_SQL = read_statements("everruns_pipelines.items", "reading.sql")


def read_spans(
    connection: Connection,
    clickhouse: ClickHouseDatabase,
    selections: Callable[[SpanTable], Iterable[Selection]],
    projects: Sequence[str] | None,
    log: Log,
) -> dict[str | None, int]:
    """Stage the selected spans. The connection to ClickHouse is open no longer than that.

    Args:
        projects: names under which the spans know the projects in scope; None = all spans.

    Returns:
        How many spans there are of each known project; under None, those of others.

    Raises:
        ClickHouseFailure: ClickHouse refused, stalled or cut its answer each time.
        Refusal: it cannot answer, or there is no such table.
    """

    def read() -> None:
        connection.execute("TRUNCATE staged_spans")
        with clickhouse.connect(log) as opened:
            table = SpanTable.of(opened, clickhouse.settings.spans_table)
            for selection in selections(table):
                copy(connection, _SQL["copy"], opened.stream(*table.query(selection, projects)))

    retrying(read, log)
    counted = connection.execute(_SQL["by_project"]).fetchall()
    if any(are_repeated for _, _, are_repeated in counted):
        connection.execute(_SQL["drop_repeats"])
        counted = connection.execute(_SQL["by_project"]).fetchall()
    return {project: spans for project, spans, _ in counted}


def copy(connection: Connection, statement: LiteralString, answer: Iterable[bytes]) -> None:
    """Copy an answer of ClickHouse into a table.

    Raises:
        ClickHouseFailure: the answer is cut, or holds something else.
    """
    try:
        with connection.cursor() as cursor, cursor.copy(statement) as into:
            for chunk in answer:
                into.write(chunk)
    except (psycopg.DataError, psycopg.IntegrityError) as error:
        # Whatever a span holds is copied as text. Lines of another shape are an error message
        # that a server wrote into its answer after it had begun. Not repeated: it may quote spans.
        raise ClickHouseFailure(
            f"the answer is cut or holds an error (SQLSTATE {error.sqlstate})"
        ) from None
