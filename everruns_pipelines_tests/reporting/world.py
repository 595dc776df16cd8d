"""Makes source rows and outbox rows one by one, for tests in which each row matters."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import count
from time import monotonic, sleep
from typing import Any, LiteralString
from uuid import UUID, uuid4

import dagster as dg
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import FACTS, SOURCES
from everruns_pipelines.reporting.drain import Drained, drain
from everruns_pipelines.reporting.query import rows_of
from everruns_pipelines.reporting.reconcile import materialize_days

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = NOON.date()
# PostgreSQL knows them, Python's calendar does not.
TIMES_BEYOND_PYTHON = ("54000-02-03 04:05", "0044-03-15 12:00 BC", "infinity", "-infinity")
MAX_ATTEMPTS = 12
REASONS = {source.type: source.reason for source in SOURCES}

_sequences = count(1)


@dataclass(frozen=True)
class World:
    """Source rows, each made by one method that answers its id."""

    connection: Connection

    def org(self) -> int:
        return int(
            self._id(
                "INSERT INTO organizations (public_id, name) VALUES (%s, 'Org') RETURNING org_id",
                f"org_{uuid4().hex}",
            )
        )

    def agent(self, org_id: int, name: str = "Agent") -> UUID:
        return self._insert("agents", org_id=org_id, name=name, system_prompt="")

    def session(self, org_id: int, **columns: Any) -> UUID:
        principal = self._insert(
            "principals", public_id=f"principal_{uuid4().hex}", org_id=org_id, kind="user"
        )
        workspace = self._insert(
            "workspaces", public_id=f"wsp_{uuid4().hex}", org_id=org_id, name=uuid4().hex
        )
        defaults = {"created_at": NOON, "updated_at": NOON}
        return self._insert(
            "sessions",
            org_id=org_id,
            owner_principal_id=principal,
            workspace_id=workspace,
            **(defaults | columns),
        )

    def event(
        self,
        session_id: UUID,
        event_type: str = "tool.completed",
        *,
        ts: datetime | str = NOON,
        data: Any = None,
        context: Any = None,
    ) -> UUID:
        return self._insert(
            "events",
            session_id=session_id,
            sequence=next(_sequences),
            event_type=event_type,
            ts=ts,
            data=json.dumps({} if data is None else data),
            context=json.dumps({} if context is None else context),
        )

    def generation(self, org_id: int, session_id: UUID | None = None, **columns: Any) -> UUID:
        defaults: dict[str, Any] = {"created_at": NOON, "model": "model"}
        return self._insert(
            "llm_generations", org_id=org_id, session_id=session_id, **(defaults | columns)
        )

    def posting(
        self, org_id: int, session_id: UUID | None = None, amount: float = 1, **columns: Any
    ) -> UUID:
        journal = self._insert("usage_journal", org_id=org_id, kind="usage")
        return self._insert(
            "usage_ledger",
            journal_id=journal,
            org_id=org_id,
            session_id=session_id,
            currency="USD",
            amount=amount,
            meter_source="meter",
            **({"created_at": NOON} | columns),
        )

    def enqueue(
        self,
        org_id: int,
        source_type: str,
        source_id: UUID | str,
        version: str = "",
        **columns: Any,
    ) -> UUID:
        return self._insert(
            "reporting_outbox",
            org_id=org_id,
            source_type=source_type,
            source_id=str(source_id),
            source_version=version,
            reason=REASONS.get(source_type, "reason"),
            **columns,
        )

    def tool_call(self, org_id: int, **columns: Any) -> UUID:
        """A session's event with its outbox row; answers the outbox row."""
        event = self.event(self.session(org_id))
        return self.enqueue(org_id, "event", event, str(event), **columns)

    def _insert(self, table: str, **columns: Any) -> UUID:
        query = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING id").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join(sql.Placeholder() for _ in columns),
        )
        row = self.connection.execute(query, list(columns.values())).fetchone()
        assert row is not None
        return UUID(str(row[0]))

    def _id(self, query: LiteralString, *parameters: Any) -> Any:
        row = self.connection.execute(query, parameters).fetchone()
        assert row is not None
        return row[0]


def application_enqueues(connection: Connection, outbox_id: UUID) -> None:
    """What the platform's upsert does to a row that is there already."""
    connection.execute(
        "UPDATE reporting_outbox"
        " SET status = CASE WHEN status = 'completed' THEN 'pending' ELSE status END,"
        " next_attempt_at = clock_timestamp(), updated_at = now() WHERE id = %s",
        [outbox_id],
    )


def archive(connection: Connection, *events: UUID) -> None:
    """What retention does: move events to the archive."""
    with connection.transaction():
        connection.execute("SET LOCAL app.archival_bypass = 'true'")
        connection.execute(
            "WITH old AS (DELETE FROM events WHERE id = ANY (%s) RETURNING *)"
            " INSERT INTO archived_events SELECT old.*, now() FROM old",
            [list(events)],
        )


def purge_sessions(connection: Connection, *sessions: UUID) -> None:
    """What the platform's purge does: the sessions go, and what hangs on them."""
    with connection.transaction():
        connection.execute("SET LOCAL app.session_purge = 'true'")
        connection.execute("DELETE FROM sessions WHERE id = ANY (%s)", [list(sessions)])


def enqueue_all(connection: Connection) -> int:
    """An outbox row for every source row; how many."""
    enqueued = 0
    for source in SOURCES:
        enqueued += connection.execute(
            sql.SQL(
                "INSERT INTO reporting_outbox"
                " (org_id, source_type, source_id, source_version, reason)"
                " SELECT {org_id}, {type}, source.id::text, source.id::text, {reason}"
                " FROM {rows} AS source {session} ON CONFLICT DO NOTHING"
            ).format(
                org_id=sql.SQL("session.org_id" if source.org_from_session else "source.org_id"),
                type=sql.Literal(source.type),
                reason=sql.Literal(source.reason),
                rows=rows_of(source),
                session=sql.SQL(
                    "JOIN sessions AS session ON session.id = source.session_id"
                    if source.org_from_session
                    else ""
                ),
            )
        ).rowcount
    return enqueued


def drain_all(connection: Connection, **options: Any) -> Drained:
    """Drain until nothing is due; what was done in all."""
    drained = Drained()
    for batch in drain(connection, **({"max_attempts": MAX_ATTEMPTS} | options)):
        drained.add(batch)
    return drained


def materialize(
    connection: Connection, first: date = DAY, last: date | None = None, **options: Any
) -> Counter[str]:
    """Materialize days of every fact; the counts in all."""
    last = first if last is None else last
    totals = Counter[str]()
    for fact in FACTS:
        for _, report in materialize_days(connection, fact, first, last, **options):
            totals.update(report.counts)
    return +totals


def rows(connection: Connection, query: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
    return connection.execute(query, parameters).fetchall()


def value(connection: Connection, query: LiteralString, *parameters: Any) -> Any:
    [(found,)] = rows(connection, query, *parameters)
    return found


def outbox(connection: Connection, outbox_id: UUID, *columns: str) -> tuple[Any, ...]:
    """Columns of an outbox row."""
    query = sql.SQL("SELECT {} FROM reporting_outbox WHERE id = %s").format(
        sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    [row] = connection.execute(query, [outbox_id]).fetchall()
    return row


def versions(connection: Connection, tables: Sequence[str] | None = None) -> set[tuple[Any, ...]]:
    """Every stored version of a fact: it changes whenever a row is written, equal or not."""
    found: set[tuple[Any, ...]] = set()
    for table in [fact.table for fact in FACTS] if tables is None else tables:
        query = sql.SQL("SELECT xmin::text, projected_at, org_id, source_key FROM {}")
        found |= {(table, *row) for row in connection.execute(query.format(sql.Identifier(table)))}
    return found


def ephemeral() -> dg.DagsterInstance:
    """Dagster's storage, in memory."""
    return dg.DagsterInstance.ephemeral()  # pyright: ignore[reportUnknownMemberType]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Wait for a condition that another process or thread brings about."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, f"waited {seconds:g} s for {what}"
        sleep(0.01)


def waiting(connection: Connection) -> int:
    """How many connections to this database wait for a lock."""
    return value(
        connection,
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'",
    )


def rows_read(connection: Connection) -> int:
    """Of all tables: entries of indexes, and rows of whole scans."""
    connection.execute("SELECT pg_stat_force_next_flush()")
    connection.execute("SELECT pg_stat_clear_snapshot()")
    return int(
        value(
            connection,
            "SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes)"
            " + (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'public')",
        )
    )
