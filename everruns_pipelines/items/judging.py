"""Judges every item output of the spans that were read: into the table `candidates`.

PostgreSQL parses what is sound JSON. The rest is cut out by envelope.py, and judged the same way.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import psycopg
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.envelope import Found, read_damaged

_SQL = read_statements("everruns_pipelines.items", "judging.sql")
_VALUES_AT_ONCE = 4


def judge(connection: Connection, session: str | None) -> None:
    """Judge what stands in the spans themselves.

    Args:
        session: of spans that are not meant as a whole, the envelopes that name it are.
    """
    try:
        _judge_from(connection, "readable", session)
    except psycopg.DataError:
        # ClickHouse took for JSON what PostgreSQL does not: find out which, and judge again.
        connection.execute(_SQL["take_for_damaged"])
        _judge_from(connection, "readable", session)
    connection.execute(_SQL["unreadable"])
    stage_values(connection, _damaged(connection))
    judge_values(connection, session)
    connection.execute("TRUNCATE staged_values")


def judge_values(connection: Connection, session: str | None) -> None:
    """Judge the values that are staged beside the spans."""
    _judge_from(connection, "values", session)


def stage_values(connection: Connection, values: Iterable[tuple[int, bool, Found]]) -> None:
    """Put values that came another way than in a readable span beside the spans.

    Args:
        values: each with the id of its span, and whether it was fetched from the object store.
    """
    rows = (
        (
            span,
            fetched,
            found.position,
            found.key_hint,
            found.session_hint,
            found.uri,
            found.size,
            found.reason,
            found.detail,
            found.value,
        )
        for span, fetched, found in values
    )
    with connection.cursor() as cursor:
        while some := list(islice(rows, _VALUES_AT_ONCE)):
            cursor.executemany(_SQL["stage_value"], some)


def _judge_from(connection: Connection, found: str, session: str | None) -> None:
    query = sql.SQL(_SQL["judge"]).format(found=sql.SQL(_SQL[found]))
    connection.execute(query, {"session": session})


def _damaged(connection: Connection) -> Iterator[tuple[int, bool, Found]]:
    with connection.transaction(), connection.cursor("damaged") as cursor:
        cursor.itersize = 1
        cursor.execute("SELECT id, outputs, objects FROM staged_spans WHERE state = 'damaged'")
        for span, outputs, objects in cursor:
            for found in read_damaged(bytes.fromhex(outputs), bytes.fromhex(objects)):
                yield span, False, found
