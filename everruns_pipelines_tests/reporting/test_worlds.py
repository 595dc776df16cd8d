"""Random worlds: whatever the platform does to its tables, every kind of run makes facts right.

Each world lives through what happens on a platform, between one kind of run and the next; after
each, every fact is recomputed in plain Python. More worlds than the suite has time for:
`EVERRUNS_TEST_WORLDS=500 pytest everruns_pipelines_tests/reporting/test_worlds.py`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from random import Random
from uuid import UUID

import pytest
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.backfill import BackfillRequest, Missing, enqueue, look
from everruns_pipelines.reporting.catalog import FACTS, SOURCES
from everruns_pipelines.reporting.reconcile import DayState, compare_days
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences, expected_facts
from everruns_pipelines_tests.reporting.world import (
    archive,
    drain_all,
    enqueue_all,
    materialize,
    purge_sessions,
    rows,
)

WORLDS = int(os.environ.get("EVERRUNS_TEST_WORLDS", "10"))
# In `make test`; the others belong to `make test-deploy`.
WORLDS_IN_SHORT = 5
# What a backfill leaves to the days: tool calls that a turn, or a session in the middle of one,
# got later.
_LATE = ("tool_call_count is", "turn_count is")


@dataclass(frozen=True)
class Platform:
    """What happens on a platform, at random."""

    connection: Connection
    dice: Random

    def retention(self) -> None:
        """Events older than a moment are archived."""
        events = self._events()
        archive(self.connection, *events[: self.dice.randint(0, len(events))])

    def retention_cuts_anywhere(self) -> None:
        events = self._events()
        archive(self.connection, *self.dice.sample(events, len(events) // 4))

    def purge(self) -> None:
        sessions = self._sessions()
        if len(sessions) > 2:
            purge_sessions(self.connection, self.dice.choice(sessions))

    def re_key(self) -> None:
        self.connection.execute(
            "UPDATE budgets SET subject_type = %s, subject_id = subject_id || '+'"
            " WHERE id = (SELECT budget_id FROM usage_ledger WHERE budget_id IS NOT NULL"
            " ORDER BY md5(id::text || %s) LIMIT 1)",
            [self.dice.choice(("agent_trigger", "agent_channel", "user")), self._salt()],
        )

    def go_on(self) -> None:
        """A session goes on: tool calls, and the end of their turn, mostly enqueued."""
        session = self.dice.choice(self._sessions())
        kinds = ["tool.completed"] * self.dice.randint(0, 3)
        kinds += [self.dice.choice(("turn.completed", "turn.failed", "tool.completed"))]
        for kind in kinds:
            self.connection.execute(
                "INSERT INTO events (session_id, sequence, event_type, ts, created_at, data)"
                " VALUES (%s, (SELECT coalesce(max(sequence), 0) + 1 FROM events"
                " WHERE session_id = %s) + 1000, %s, %s, %s, %s)",
                [session, session, kind, self._moment(), self._moment(), '{"turn_id": "turn-1"}'],
            )
        self.connection.execute(
            "UPDATE sessions SET status = 'resolving_tool_results',"
            " capabilities = jsonb_build_array(repeat('c', 71), %s::text) WHERE id = %s",
            [self._salt(), session],
        )

    def enqueue_on_the_hot_path(self) -> None:
        """Sessions with their versions in the spelling of the hot path, and some of the events."""
        for spelling in ('YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'):
            self.connection.execute(
                "INSERT INTO reporting_outbox"
                " (org_id, source_type, source_id, source_version, reason)"
                " SELECT org_id, 'session', id, to_char(updated_at, %s), 'session_snapshot'"
                " FROM sessions WHERE md5(id::text || %s) < '6' ON CONFLICT DO NOTHING",
                [spelling, self._salt()],
            )
        self.connection.execute(
            "INSERT INTO reporting_outbox (org_id, source_type, source_id, source_version, reason)"
            " SELECT org_id, 'event', events.id, events.id, 'event_projection'"
            " FROM events JOIN sessions ON sessions.id = session_id"
            " WHERE md5(events.id::text || %s) < '6' ON CONFLICT DO NOTHING",
            [self._salt()],
        )

    def another_projector(self) -> None:
        """Upstream's: claims rows as processing; finishes them, or dies."""
        claimed = rows(
            self.connection,
            "UPDATE reporting_outbox SET status = 'processing', claimed_at = now(),"
            " attempts = attempts + 1 WHERE id IN (SELECT id FROM reporting_outbox"
            " WHERE status = 'pending' ORDER BY md5(id::text || %s) LIMIT 20"
            " FOR UPDATE SKIP LOCKED) RETURNING id, source_type || ':' || source_id",
            self._salt(),
        )
        if self.dice.random() < 0.3:
            return self._died([id_ for id_, _ in claimed])
        sources = {key for _, key in claimed}
        for table, facts in expected_facts(self.connection).items():
            for (_, key), fact in facts.items():
                if ":".join(key.split(":")[:2]) in sources:
                    columns = sql.SQL(", ").join(map(sql.Identifier, fact))
                    self.connection.execute(
                        sql.SQL(
                            "INSERT INTO {} ({}) VALUES ({})"
                            " ON CONFLICT (org_id, source_key) DO UPDATE"
                            " SET ({}, projected_at) = ROW ({}, now())"
                        ).format(
                            sql.Identifier(table),
                            columns,
                            sql.SQL(", ").join(sql.Placeholder() for _ in fact),
                            columns,
                            sql.SQL(", ").join(sql.Identifier("excluded", name) for name in fact),
                        ),
                        list(fact.values()),
                    )
        self._settled("completed", [id_ for id_, _ in claimed])
        return None

    def lose(self) -> None:
        """Facts are lost."""
        for fact in FACTS:
            self.connection.execute(
                sql.SQL("DELETE FROM {} WHERE md5(source_key || %s) < '2'").format(
                    sql.Identifier(fact.table)
                ),
                [self._salt()],
            )

    def _died(self, claimed: list[UUID]) -> None:
        """Its claims are stale after a while."""
        self.connection.execute("ALTER TABLE reporting_outbox DISABLE TRIGGER USER")
        self.connection.execute(
            "UPDATE reporting_outbox SET claimed_at = now() - interval '1 hour',"
            " updated_at = now() - interval '1 hour' WHERE id = ANY (%s)",
            [claimed],
        )
        self.connection.execute("ALTER TABLE reporting_outbox ENABLE TRIGGER USER")

    def _settled(self, status: str, claimed: list[UUID]) -> None:
        self.connection.execute(
            "UPDATE reporting_outbox SET status = %s WHERE id = ANY (%s)", [status, claimed]
        )

    def _events(self) -> list[UUID]:
        found = rows(self.connection, "SELECT id FROM events ORDER BY created_at, id")
        return [id_ for (id_,) in found]

    def _sessions(self) -> list[UUID]:
        return [id_ for (id_,) in rows(self.connection, "SELECT id FROM sessions ORDER BY id")]

    def _moment(self) -> datetime:
        return datetime(2026, 3, 1, tzinfo=UTC) + timedelta(minutes=self.dice.randrange(6_000))

    def _salt(self) -> str:
        return str(self.dice.random())


def project(connection: Connection) -> None:
    """Every source is enqueued, again or for the first time."""
    connection.execute("UPDATE reporting_outbox SET status = 'pending', next_attempt_at = now()")
    enqueue_all(connection)
    drain_all(connection)


def backfill(connection: Connection) -> None:
    drain_all(connection)
    while enqueue(connection, BackfillRequest(limit=300))["enqueued"]:
        drain_all(connection)


def backfill_one_organization_after_the_other(connection: Connection) -> None:
    drain_all(connection)
    for (org_id,) in rows(connection, "SELECT org_id FROM organizations"):
        while enqueue(connection, BackfillRequest(limit=300, org_id=org_id))["enqueued"]:
            drain_all(connection)


def days(connection: Connection) -> None:
    for (day,) in rows(connection, _DAYS):
        materialize(connection, day)


def range_of_days(connection: Connection) -> None:
    found = sorted(day for (day,) in rows(connection, _DAYS))
    recent = [day for day in found if day.year == 2026]
    for day in found:
        if day.year < 2026:
            materialize(connection, day)
    materialize(connection, recent[0], recent[-1])


BACKFILLS = (backfill, backfill_one_organization_after_the_other)
RUNS: tuple[Callable[[Connection], None], ...] = (project, *BACKFILLS, days, range_of_days)
RUNS_OF_A_WORLD = 4

_DAYS = """
SELECT ts::date FROM events UNION SELECT ts::date FROM archived_events
UNION SELECT created_at::date FROM sessions UNION SELECT created_at::date FROM llm_generations
UNION SELECT created_at::date FROM usage_ledger
UNION SELECT time_bucket_day FROM fact_session UNION SELECT time_bucket_day FROM fact_turn
UNION SELECT time_bucket_day FROM fact_tool_call
UNION SELECT time_bucket_day FROM fact_capability_usage
"""


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed < WORLDS_IN_SHORT else pytest.mark.deploy)
        for seed in range(WORLDS)
    ],
)
def test_facts_are_right_after_every_kind_of_run(ready: Connection, seed: int) -> None:
    dice = Random(f"world {seed}")
    load_adversarial_sources(ready, seed=1_000 + seed, sessions=4, events_per_session=5)
    platform = Platform(ready, dice)
    happenings = (
        platform.retention,
        platform.retention_cuts_anywhere,
        platform.purge,
        platform.re_key,
        platform.go_on,
        platform.enqueue_on_the_hot_path,
        platform.another_projector,
        platform.lose,
    )
    for run in dice.sample(RUNS, RUNS_OF_A_WORLD):
        told = [dice.choice(happenings) for _ in range(dice.randint(2, 6))]
        for happening in told:
            happening()
        run(ready)
        wrong = differences(ready, orphans=True)
        if run in BACKFILLS:
            wrong = [line for line in wrong if not any(late in line for late in _LATE)]
        story = f"{run.__name__} after {[happening.__name__ for happening in told]}"
        assert wrong == [], story
        if run is not project:
            assert {kind: found.sources for kind, found in look(ready).items()} == {
                source.type: Missing().sources for source in SOURCES
            }, story
    range_of_days(ready)
    for fact in FACTS:
        for state in compare_days(ready, fact, date(2026, 3, 1), date(2026, 3, 6)).values():
            assert state == DayState(expected=state.expected, orphaned=state.orphaned)
