"""Erasure: what is derived from a session that is gone, and how it goes.

Nothing is removed whose source stands, and nothing of the platform's own tables but its outbox and
its facts.
"""

from uuid import UUID

import psycopg
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.reporting.catalog import FACTS, SOURCES, USAGE_LEDGER
from everruns_pipelines.reporting.projector import project_selection, projections_of
from everruns_pipelines.reporting.query import KEY_OF_FACT, stands
from everruns_pipelines.reporting.selection import stage

_SQL = read_statements("everruns_pipelines.reporting", "erasure.sql")
_TABLES = (
    *(fact.table for fact in FACTS),
    "everruns_pipelines.fact_rejections",
    "everruns_pipelines.key_digests",
    "reporting_outbox",
)
_IS_GONE = sql.SQL("NOT EXISTS (SELECT FROM sessions WHERE sessions.id = %(session_id)s)")


def check_session_id(value: str) -> str:
    """The session in the one form that PostgreSQL reads, too: Python takes more than it does.

    Raises:
        Refusal: it is no UUID.
    """
    try:
        return str(UUID(value))
    except ValueError:
        expected = "expected the UUID of a session"
        raise Refusal(
            f"session_id: {expected}", errors=(FieldError(("session_id",), expected),)
        ) from None


def erase(connection: Connection, session_id: str, *, dry_run: bool = False) -> dict[str, int]:
    """Remove what is derived from the session and has lost its source, in one transaction.

    Of a session that stands, that is little or nothing. Postings outlive their session: their facts
    are projected again, so that they no longer name it.

    Args:
        session_id: a UUID, whether or not there is or was such a session.
        dry_run: count only.

    Returns:
        Rows removed, by table.

    Raises:
        Refusal: the session is no UUID.
    """
    parameters = {"session_id": UUID(check_session_id(session_id))}
    with connection.transaction() as erasing:
        row = connection.execute(_statement(), parameters).fetchone()
        postings = sql.SQL(_SQL["postings_that_name_it"]).format(key=KEY_OF_FACT, is_gone=_IS_GONE)
        staged = stage(connection, postings, parameters)
        project_selection(connection, projections_of(USAGE_LEDGER), 1, staged)
        if dry_run:
            raise psycopg.Rollback(erasing)
    assert row is not None
    return dict(zip(_TABLES, row, strict=True))


def forget_sessions(connection: Connection, session_id: str | None = None) -> None:
    """Remove what our own tables keep of sessions that are gone: of this one, or of all."""
    for name in ("forget_digests", "forget_rejections"):
        connection.execute(_SQL[name], {"session_id": session_id})


def _statement() -> sql.Composed:
    facts = [sql.Identifier(fact.table) for fact in FACTS]
    return sql.SQL(_SQL["erase"]).format(
        facts=sql.SQL(", ").join(
            sql.SQL(_SQL["erase_facts"]).format(
                fact=sql.Identifier(fact.table),
                key=KEY_OF_FACT,
                stands=stands(fact.sources, "fact.org_id"),
            )
            for fact in FACTS
        ),
        key=KEY_OF_FACT,
        stands=stands(SOURCES, "fact.org_id"),
        is_gone=_IS_GONE,
        traces=sql.SQL(" UNION ").join(
            sql.SQL("SELECT source_key FROM {}").format(fact) for fact in facts
        ),
        counts=sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("(SELECT count(*) FROM {})").format(sql.Identifier(table))
                for table in _TABLES
            )
        ),
    )
