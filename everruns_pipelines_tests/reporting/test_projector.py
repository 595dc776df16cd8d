"""Projections: facts are what their sources make them, and only what differs is written."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase, transaction
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SESSION, SOURCES, Source
from everruns_pipelines.reporting.projector import (
    Outcome,
    project_selection,
    projections_of,
)
from everruns_pipelines.reporting.query import rows_of
from everruns_pipelines.reporting.selection import stage
from everruns_pipelines_tests.reporting.adversarial import (
    load_adversarial_sources,
    load_unstorable_sources,
)
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    NOON,
    TIMES_BEYOND_PYTHON,
    World,
    drain_all,
    enqueue_all,
    materialize,
    rows,
    value,
    versions,
    wait_until,
    waiting,
)

_ALL = sql.SQL("SELECT {org_id}, source.id FROM {rows} AS source {session}")
_OF_EVENTS: tuple[LiteralString, ...] = (
    "fact_tool_call",
    "fact_turn",
    "fact_capability_usage",
)
DIGITS_BEYOND_BIGINT = "9" * 30


def project_all(connection: Connection, source: Source) -> Outcome:
    """Project every row of a source in one transaction."""
    from_session = sql.SQL("JOIN sessions AS session ON session.id = source.session_id")
    query = _ALL.format(
        org_id=sql.SQL("session.org_id" if source.org_from_session else "source.org_id"),
        rows=rows_of(source),
        session=from_session if source.org_from_session else sql.SQL(""),
    )
    named = sql.SQL("SELECT org_id, id AS source_id FROM ({}) AS every").format(query)
    with transaction(connection):
        staged = stage(connection, named, {})
        return project_selection(connection, projections_of(source), 1, staged)


def written(outcome: Outcome) -> int:
    return sum(counts["inserted"] + counts["refreshed"] for counts in outcome.counts.values())


def rejections(connection: Connection) -> list[tuple[Any, ...]]:
    return rows(
        connection,
        "SELECT fact, source_key, reason, written FROM everruns_pipelines.fact_rejections"
        " ORDER BY 1, 2",
    )


@pytest.mark.parametrize("time", TIMES_BEYOND_PYTHON)
def test_sources_of_a_time_that_python_cannot_hold_are_written_like_their_neighbours(
    world: World, time: str
) -> None:
    connection = world.connection
    org = world.org()
    for created_at in (NOON, time):
        session = world.session(org, created_at=created_at)
        world.event(session, ts=created_at, data={"capability_id": "c"})
        world.event(session, "turn.completed", ts=created_at)
        world.generation(org, session, created_at=created_at)
        world.posting(org, session, created_at=created_at)
    enqueued = enqueue_all(connection)

    drained = drain_all(connection)

    assert (drained.completed, drained.failed) == (enqueued, 0)
    for fact in FACTS:
        written_at = sql.SQL(
            "SELECT created_at = %(time)s, count(*) FROM {}"
            " WHERE time_bucket_day = (created_at AT TIME ZONE 'UTC')::date"
            " AND created_at IN (%(noon)s, %(time)s) GROUP BY 1 ORDER BY 1"
        ).format(sql.Identifier(fact.table))
        found = connection.execute(written_at, {"time": time, "noon": NOON}).fetchall()
        assert found == [(False, 1), (True, 1)], fact.table


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_facts_equal_the_recomputation_and_projecting_again_writes_nothing(
    ready: Connection, seed: int
) -> None:
    load_adversarial_sources(ready, seed=seed, sessions=25, events_per_session=20)
    enqueued = enqueue_all(ready)

    drained = drain_all(ready, batch_size=301)

    assert differences(ready) == []
    assert (drained.claimed, drained.completed, drained.failed) == (enqueued, enqueued, 0)
    before = versions(ready)
    assert sum(written(project_all(ready, source)) for source in SOURCES) == 0
    assert versions(ready) == before


def test_a_stale_row_is_refreshed_and_its_neighbours_are_not_written(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    events = [world.event(session, data={"tool_name": "tool"}) for _ in range(3)]
    project_all(connection, SESSION)
    project_all(connection, EVENT)
    before = versions(connection)
    connection.execute(
        "UPDATE fact_tool_call SET tool_name = 'wrong', duration_ms = 5 WHERE source_key = %s",
        [f"event:{events[1]}"],
    )

    outcome = project_all(connection, EVENT)

    assert differences(connection) == []
    [counts] = outcome.counts.values()
    assert (counts["read"], counts["refreshed"], counts["unchanged"]) == (3, 1, 2)
    changed = {key for *_, key in versions(connection) ^ before}
    assert changed == {f"event:{events[1]}"}


def test_a_source_that_cannot_be_stored_fails_alone_and_is_named_without_its_values(
    ready: Connection,
) -> None:
    failing = load_unstorable_sources(ready, seed=1)
    load_adversarial_sources(ready, seed=9, sessions=4)
    enqueued = enqueue_all(ready)

    drained = drain_all(ready)

    failed = rows(
        ready,
        "SELECT source_type, source_id, last_error FROM reporting_outbox WHERE status = 'failed'",
    )
    assert {(type_, id_) for type_, id_, _ in failed} == set(failing)
    assert (drained.failed, drained.completed) == (len(failing), enqueued - len(failing))
    named = re.compile("ProgramLimitExceeded: fact_[a-z_]+|total_tokens is beyond bigint")
    assert [error for *_, error in failed if not named.fullmatch(error)] == []
    assert differences(ready) == []


def test_an_event_that_lies_in_both_tables_is_one_and_holds_nobody_back(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    for _ in range(2):
        world.event(session, data={"tool_name": "tool", "capability_id": "c"})
    world.event(session, "turn.completed")
    connection.execute(
        "INSERT INTO archived_events"
        " (id, session_id, sequence, event_type, data, ts, context, created_at)"
        " SELECT id, session_id, sequence, event_type, data, ts, context, created_at FROM events"
        " WHERE sequence > (SELECT min(sequence) FROM events)"
    )
    enqueue_all(connection)
    for _ in ("new", "standing"):
        drained = drain_all(connection)
        assert (drained.claimed, drained.completed) == (4, 4)
        counts = [value(connection, f"SELECT count(*) FROM {table}") for table in _OF_EVENTS]
        assert counts == [2, 1, 2]
        connection.execute("UPDATE fact_tool_call SET tool_name = 'damaged'")
        connection.execute("UPDATE fact_turn SET turn_status = 'damaged'")
        connection.execute("UPDATE reporting_outbox SET status = 'pending'")
    assert materialize(connection)["refreshed"] == 3
    assert value(connection, "SELECT DISTINCT tool_name FROM fact_tool_call") == "tool"


def test_the_duration_of_a_session_is_exact_however_far_apart_its_times(world: World) -> None:
    connection = world.connection
    org = world.org()
    times = {
        ("2026-03-01 00:00:00.0004", "2026-03-01 00:00:01.0009"): 1001,  # half a millisecond: up
        ("2026-03-01 00:00:00", "2026-03-01 00:00:01.0004"): 1000,
        ("2026-03-02", "2026-03-01"): 0,
        (None, "2026-03-01"): 0,
        ("2026-03-01", None): 0,
        ("infinity", "2026-03-01"): 0,
        ("0001-01-01", "9999-12-31"): 3652058 * 86_400_000,
        ("4713-01-01 BC", "294276-12-31"): 109203489 * 86_400_000,
    }
    durations = {
        f"session:{world.session(org, started_at=started, finished_at=finished)}": duration
        for (started, finished), duration in times.items()
    }
    endless = [
        str(world.session(org, started_at=started, finished_at=finished))
        for started, finished in (
            ("2026-03-01", "infinity"),
            ("-infinity", "2026-03-01"),
            ("infinity", "infinity"),
            ("-infinity", "-infinity"),
        )
    ]

    outcome = project_all(connection, SESSION)

    assert dict(rows(connection, "SELECT source_key, duration_ms FROM fact_session")) == durations
    assert sorted((failure.source_id, failure.reason) for failure in outcome.failures) == [
        (id_, "duration_ms is beyond bigint") for id_ in sorted(endless)
    ]


def test_unstorable_sources_lack_facts_only_in_their_own_table_when_a_day_is_materialized(
    ready: Connection,
) -> None:
    load_unstorable_sources(ready, seed=2)
    days = rows(ready, "SELECT DISTINCT (ts AT TIME ZONE 'UTC')::date FROM events")
    days += rows(ready, "SELECT DISTINCT (created_at AT TIME ZONE 'UTC')::date FROM sessions")
    days += rows(ready, "SELECT (created_at AT TIME ZONE 'UTC')::date FROM llm_generations")
    days += rows(ready, "SELECT (created_at AT TIME ZONE 'UTC')::date FROM usage_ledger")

    for (day,) in set(days):
        materialize(ready, day)

    assert differences(ready, each_table_alone=True) == []


def test_rejections_are_recorded_without_their_values(world: World) -> None:
    session = world.session(world.org())
    project_all(world.connection, SESSION)
    bad = world.event(
        session,
        "capability.usage",
        data={
            "records": [
                {"capability_id": "good", "usage_kind": "exposed"},
                {"capability_id": None, "usage_kind": "exposed"},
                {"capability_id": "secret", "usage_kind": "secret kind"},
                {"capability_id": "skipped, for it has no kind"},
            ]
        },
    )

    project_all(world.connection, EVENT)

    key = f"event:{bad}:capability_usage"
    assert rejections(world.connection) == [
        ("fact_capability_usage", f"{key}:2", "capability_id is null", False),
        ("fact_capability_usage", f"{key}:3", "usage_kind is unknown", False),
    ]
    assert differences(world.connection) == []


def test_rejections_are_replaced_and_removed_by_the_next_projection(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    good = world.event(session, data={"tool_name": "t", "duration_ms": 5})
    odd = world.event(session, data={"duration_ms": DIGITS_BEYOND_BIGINT})
    project_all(connection, EVENT)
    right = rejections(connection)
    assert right == [("fact_tool_call", f"event:{odd}", "a number is beyond bigint", True)]
    connection.execute("UPDATE everruns_pipelines.fact_rejections SET reason = 'outdated'")
    connection.execute(
        "INSERT INTO everruns_pipelines.fact_rejections (fact, org_id, source_key, reason, written)"
        " SELECT 'fact_tool_call', org_id, source_key, 'outdated', true FROM fact_tool_call"
        " WHERE source_key = %s",
        [f"event:{good}"],
    )

    project_all(connection, EVENT)

    assert rejections(connection) == right


def test_a_null_capability_on_an_event_rejects_the_usage_and_writes_the_tool_call(
    world: World,
) -> None:
    session = world.session(world.org())
    tool = world.event(session, data={"tool_name": "t", "capability_id": None})
    guardrail = world.event(
        session, "output.message.replaced", data={"guardrail_capability_id": None}
    )

    project_all(world.connection, EVENT)

    assert rows(world.connection, "SELECT source_key FROM fact_tool_call") == [(f"event:{tool}",)]
    assert value(world.connection, "SELECT count(*) FROM fact_capability_usage") == 0
    assert {(key, reason) for _, key, reason, _ in rejections(world.connection)} == {
        (f"event:{tool}:invoked", "capability_id is null"),
        (f"event:{guardrail}:effect_ran", "capability_id is null"),
    }


def test_digits_beyond_bigint_count_as_no_number_and_are_reported(world: World) -> None:
    session = world.session(world.org())
    world.event(session, data={"duration_ms": int(DIGITS_BEYOND_BIGINT)})
    world.event(session, "turn.completed", data={"usage": {"input_tokens": DIGITS_BEYOND_BIGINT}})
    element = {"capability_id": "c", "usage_kind": "exposed", "usage_count": DIGITS_BEYOND_BIGINT}
    world.event(session, "capability.usage", data={"records": [element]})

    outcome = project_all(world.connection, EVENT)

    assert outcome.failures == []
    assert rows(world.connection, "SELECT duration_ms FROM fact_tool_call") == [(0,)]
    assert rows(world.connection, "SELECT input_tokens FROM fact_turn") == [(0,)]
    assert rows(world.connection, "SELECT usage_count FROM fact_capability_usage") == [(1,)]
    assert {
        (fact, why, is_written) for fact, _, why, is_written in rejections(world.connection)
    } == {
        (fact, "a number is beyond bigint", True)
        for fact in ("fact_tool_call", "fact_turn", "fact_capability_usage")
    }


def test_projecting_a_session_removes_no_fact_of_another_one(world: World) -> None:
    connection = world.connection
    org = world.org()
    owner = world.session(org, capabilities='["kept"]')
    other = world.session(org)
    enqueue_all(connection)
    drain_all(connection)
    connection.execute("UPDATE fact_capability_usage SET session_id = %s", [other])
    connection.execute("DELETE FROM reporting_outbox")
    world.enqueue(org, "session", other)

    drain_all(connection)

    assert rows(connection, "SELECT source_key FROM fact_capability_usage") == [
        (f"session:{owner}:configured:session:kept",)
    ]


def test_late_tool_calls_and_renames_are_put_right_by_materializing_the_day(world: World) -> None:
    connection = world.connection
    org = world.org()
    agent = world.agent(org, "before")
    session = world.session(org, agent_id=agent)
    world.event(session, "turn.completed", data={"turn_id": "turn"})
    world.generation(org, session)
    enqueue_all(connection)
    drain_all(connection)
    world.event(session, data={"turn_id": "turn"})
    connection.execute("UPDATE agents SET name = 'after' WHERE id = %s", [agent])
    assert any("tool_call_count" in line for line in differences(connection))

    materialize(connection)

    assert differences(connection) == []
    assert rows(connection, "SELECT tool_call_count, agent_name_snapshot FROM fact_turn") == [
        (1, "after")
    ]


def _session_with_facts(world: World, **columns: Any) -> UUID:
    session = world.session(world.org(), **columns)
    project_all(world.connection, SESSION)
    return session


def test_an_older_snapshot_of_a_session_never_overwrites_one_that_was_written_meanwhile(
    world: World, postgres: PostgresDatabase
) -> None:
    """A foreign projector, which holds none of our locks, writes the newer state under our eyes."""
    session = _session_with_facts(world, total_input_tokens=1)
    older, newer = NOON + timedelta(hours=1), NOON + timedelta(hours=2)
    world.connection.execute("ALTER TABLE sessions DISABLE TRIGGER set_updated_at")
    set_session = "UPDATE sessions SET updated_at = %s, total_input_tokens = %s WHERE id = %s"
    world.connection.execute(set_session, [older, 10, session])
    with (
        postgres.connect() as foreign,
        postgres.connect() as ours,
        ThreadPoolExecutor(1) as executor,
    ):
        with foreign.transaction():
            foreign.execute(set_session, [newer, 20, session])
            foreign.execute(
                "UPDATE fact_session SET last_active_at = %s, input_tokens = 20, total_tokens = 20,"
                " projected_at = now()",
                [newer],
            )
            projecting = executor.submit(project_all, ours, SESSION)
            wait_until(lambda: waiting(world.connection), "our projection to wait")
            assert value(world.connection, "SELECT last_active_at FROM fact_session") == NOON
        projecting.result(timeout=30)

    assert rows(world.connection, "SELECT last_active_at, input_tokens FROM fact_session") == [
        (newer, 20)
    ]
    assert differences(world.connection) == []


def test_an_older_snapshot_of_a_session_brings_back_no_capability_that_a_newer_one_removed(
    world: World, postgres: PostgresDatabase
) -> None:
    session = world.session(world.org(), capabilities='["kept", "removed"]')
    with (
        postgres.connect() as first,
        postgres.connect() as second,
        ThreadPoolExecutor(1) as executor,
    ):
        with first.transaction():
            project_all(first, SESSION)
            world.connection.execute(
                "UPDATE sessions SET capabilities = '[\"kept\"]' WHERE id = %s", [session]
            )
            projecting = executor.submit(project_all, second, SESSION)
            wait_until(lambda: waiting(world.connection), "the second to wait")
        projecting.result(timeout=30)

    assert rows(world.connection, "SELECT capability_id FROM fact_capability_usage") == [("kept",)]
    assert differences(world.connection) == []


def test_a_capability_that_a_session_lost_goes_although_its_fact_is_written_meanwhile(
    world: World, postgres: PostgresDatabase
) -> None:
    session = world.session(world.org(), capabilities='["kept", "removed"]')
    project_all(world.connection, SESSION)
    world.connection.execute(
        "UPDATE sessions SET capabilities = '[\"kept\"]' WHERE id = %s", [session]
    )
    with (
        postgres.connect() as foreign,
        postgres.connect() as ours,
        ThreadPoolExecutor(1) as executor,
    ):
        with foreign.transaction():
            foreign.execute(
                "UPDATE fact_capability_usage SET projected_at = now()"
                " WHERE capability_id = 'removed'"
            )
            projecting = executor.submit(project_all, ours, SESSION)
            wait_until(lambda: waiting(world.connection), "our projection to wait")
        projecting.result(timeout=30)

    assert rows(world.connection, "SELECT capability_id FROM fact_capability_usage") == [("kept",)]
    assert differences(world.connection) == []


def test_projectors_of_the_same_rows_at_once_write_each_row_once(
    ready: Connection, postgres: PostgresDatabase
) -> None:
    load_adversarial_sources(ready, seed=4, sessions=15)

    def project() -> int:
        with postgres.connect() as connection:
            return sum(written(project_all(connection, source)) for source in SOURCES)

    with ThreadPoolExecutor(4) as executor:
        totals = [future.result(60) for future in [executor.submit(project) for _ in range(4)]]

    assert differences(ready) == []
    assert sum(totals) == len(versions(ready))


def test_a_projection_that_the_server_cannot_do_raises_and_writes_nothing(world: World) -> None:
    world.event(world.session(world.org()))
    world.connection.execute("ALTER TABLE fact_tool_call RENAME tool_name TO other")

    with pytest.raises(psycopg.errors.UndefinedColumn):
        project_all(world.connection, EVENT)

    assert value(world.connection, "SELECT count(*) FROM fact_tool_call") == 0
