"""Facts that somebody loses or spoils by hand, anywhere in history."""

from typing import Any

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import FACTS

# So many of each fact, the oldest: of last year if there are such.
_LOST = 5
# Values that a look finds stale, whatever it is of a session, a generation, a posting.
_SPOILED = (
    "UPDATE fact_session SET last_active_at = last_active_at - interval '1 day'",
    "UPDATE fact_llm_generation SET output_tokens = output_tokens + 1",
    "UPDATE fact_budget_posting SET amount = amount + 1",
)


def damage(connection: Connection) -> None:
    """Delete the oldest rows of every fact, and spoil some of the newest."""
    for fact in FACTS:
        connection.execute(
            sql.SQL(
                "DELETE FROM {table} WHERE (org_id, source_key) IN"
                " (SELECT org_id, source_key FROM {table} ORDER BY created_at LIMIT %s)"
            ).format(table=sql.Identifier(fact.table)),
            [_LOST],
        )
    for spoil in _SPOILED:
        table = spoil.split()[1]
        connection.execute(
            sql.SQL(
                f"{spoil} WHERE (org_id, source_key) IN (SELECT org_id, source_key FROM {table}"
                " ORDER BY created_at DESC LIMIT %s)"
            ),
            [_LOST],
        )


def facts(connection: Connection) -> list[Any]:
    """Every fact as it stands, but for when it was written."""
    found: list[Any] = []
    for fact in FACTS:
        query = sql.SQL(
            "SELECT (to_jsonb(fact) - 'projected_at')::text FROM {} AS fact"
            " ORDER BY org_id, source_key"
        ).format(sql.Identifier(fact.table))
        found += connection.execute(query).fetchall()
    return found
