"""The selection: which sources a transaction projects, and which rows of the outbox name them.

It is a temporary table, numbered, so that any part of it can be projected again. What is taken from
the outbox (`take` in `outbox.sql`) also has noted there where its row lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection

# `part` is the number. NULL: nothing is projected for it; if it fails, `error` says why. `place` is
# where the row of the outbox lies: it stays there while it is locked.
_MAKE = """
CREATE TEMPORARY TABLE IF NOT EXISTS selection (
    part integer,
    source_type text,
    org_id bigint,
    source_id uuid,
    place tid,
    outbox_id uuid,
    error text
) ON COMMIT DELETE ROWS
"""


class Facts(IntEnum):
    """Which facts of the selection may stand already: in the order in which it is tried."""

    NEW = 0
    KNOWN = 1
    CONTESTED = 2


@dataclass(frozen=True)
class Part:
    """Sources of one type, all those in the selection from number `first` to `last`."""

    source_type: str
    facts: Facts
    first: int
    last: int


@dataclass(frozen=True)
class Failure:
    """A source row whose facts cannot be stored, and why. Holds no value of the row."""

    org_id: int
    source_id: str
    reason: str


def make_selection(connection: Connection) -> None:
    """Make the table, unless the connection has it."""
    connection.execute(_MAKE)


def stage(connection: Connection, rows: sql.Composable, parameters: dict[str, Any]) -> int:
    """Make the selection out of a query for `org_id` and `source_id`, numbered from 1.

    It lasts until the end of the transaction.

    Returns:
        How many sources it holds.
    """
    make_selection(connection)
    connection.execute("DELETE FROM pg_temp.selection")
    staged = connection.execute(sql.SQL(_STAGE).format(rows=rows), parameters).rowcount
    connection.execute("ANALYZE pg_temp.selection (part)")
    return staged


def leave_out(connection: Connection, failures: Sequence[Failure], first: int, last: int) -> None:
    """Project what fails no more; its rows of the outbox say why."""
    connection.execute(
        _LEAVE_OUT,
        {
            "first": first,
            "last": last,
            "org_ids": [failure.org_id for failure in failures],
            "source_ids": [failure.source_id for failure in failures],
            "reasons": [failure.reason for failure in failures],
        },
    )


_STAGE = """
INSERT INTO pg_temp.selection (part, org_id, source_id)
SELECT row_number() OVER (ORDER BY org_id, source_id), org_id, source_id
FROM (SELECT DISTINCT org_id, source_id FROM ({rows}) AS rows) AS selected
"""

_LEAVE_OUT = """
UPDATE pg_temp.selection
SET part = NULL, error = left(failed.reason, 2000)
FROM unnest(%(org_ids)s::bigint[], %(source_ids)s::uuid[], %(reasons)s::text[])
    AS failed (org_id, source_id, reason)
WHERE selection.org_id = failed.org_id
    AND selection.source_id = failed.source_id
    AND part BETWEEN %(first)s AND %(last)s
"""
