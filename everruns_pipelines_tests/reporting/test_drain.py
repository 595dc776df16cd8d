"""Draining by real processes: together, killed in the middle, refused by the database."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.raw_cursor import RawCursor
from psycopg.types.numeric import Int4

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase, transaction
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.catalog import EVENT
from everruns_pipelines.reporting.drain import check, drain, drain_in_parallel
from everruns_pipelines.reporting.outbox import Outbox
from everruns_pipelines.reporting.projector import lock_sessions, projections_of
from everruns_pipelines.reporting.selection import Facts, stage
from everruns_pipelines.reporting.statements import writing
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    MAX_ATTEMPTS,
    World,
    drain_all,
    enqueue_all,
    materialize,
    rows,
    rows_read,
    value,
    versions,
    wait_until,
    waiting,
)

Start = Callable[[str], "subprocess.Popen[str]"]

_PROJECTOR = """
import signal, sys
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.reporting.drain import drain, drain_in_parallel
from everruns_pipelines.settings import Settings

class Terminated(BaseException):
    pass

def terminate(*_):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
postgres = PostgresDatabase(Settings.from_environment())
with postgres.connect() as connection:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print(sum(batch.completed for batch in {batches}), flush=True)
    except Terminated:
        print("terminated", flush=True)
"""
_ALONE = _PROJECTOR.replace("{batches}", "drain(connection, max_attempts=12, batch_size=150)")
_IN_PARALLEL = _PROJECTOR.replace("{batches}", "drain_in_parallel(postgres, batch_size=150)")


@pytest.fixture
def start(postgres_url: str) -> Iterator[Start]:
    """Starts a process that drains once it is told to go."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"EVERRUNS_POSTGRES_URL": postgres_url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def answer(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=60)
    return output.strip()


def by_status(connection: Connection) -> list[tuple[Any, ...]]:
    return rows(
        connection,
        "SELECT status, attempts, count(*) FROM reporting_outbox GROUP BY 1, 2 ORDER BY 1, 2",
    )


@pytest.fixture
def sources(connection: Connection) -> int:
    """Sources of every kind, all of them enqueued; how many."""
    database.prepare(connection)
    load_adversarial_sources(connection, seed=5, sessions=15, events_per_session=20)
    return enqueue_all(connection)


def test_two_processes_at_once_complete_each_row_once_and_the_facts_are_right(
    connection: Connection, sources: int, start: Start
) -> None:
    processes = [start(_ALONE), start(_ALONE)]
    for process in processes:
        ready(process)
    for process in processes:
        go(process)

    assert sum(int(answer(process)) for process in processes) == sources
    assert by_status(connection) == [("completed", 1, sources)]
    assert differences(connection) == []


def test_projectors_of_one_process_complete_each_row_once_and_the_facts_are_right(
    connection: Connection, postgres: PostgresDatabase, sources: int
) -> None:
    drained = [batch.completed for batch in drain_in_parallel(postgres, batch_size=100)]

    assert sum(drained) == sources
    assert by_status(connection) == [("completed", 1, sources)]
    assert differences(connection) == []


def test_no_more_rows_are_claimed_than_asked_for_however_many_projectors(
    connection: Connection, postgres: PostgresDatabase, sources: int
) -> None:
    claimed = [b.claimed for b in drain_in_parallel(postgres, batch_size=20, max_rows=130)]

    assert sum(claimed) == 130
    assert by_status(connection) == [("completed", 1, 130), ("pending", 0, sources - 130)]


def test_a_process_killed_in_mid_batch_loses_nothing_and_another_finishes(
    connection: Connection, postgres: PostgresDatabase, sources: int, start: Start
) -> None:
    process = start(_ALONE)
    ready(process)
    with postgres.connect() as blocker, blocker.transaction():
        # The batch has written its tool calls and stops before its turns.
        blocker.execute("LOCK TABLE fact_turn IN SHARE MODE")
        go(process)
        wait_until(lambda: waiting(connection), "the batch to be at work")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert by_status(connection) == [("pending", 0, sources)]
        assert versions(connection) == set()
    # The killed process's connection ends when the server notices.
    wait_until(
        lambda: (
            value(
                connection,
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
            )
            == 1
        ),
        "the server to notice",
    )

    drained = drain_all(connection)

    assert drained.completed == sources
    assert by_status(connection) == [("completed", 1, sources)]
    assert differences(connection) == []


@pytest.mark.parametrize("script", [_ALONE, _IN_PARALLEL], ids=["alone", "in parallel"])
def test_a_process_terminated_in_mid_batch_ends_at_once_and_nothing_of_the_batch_is_done(
    connection: Connection, postgres: PostgresDatabase, sources: int, start: Start, script: str
) -> None:
    process = start(script)
    ready(process)
    with postgres.connect() as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE fact_turn IN SHARE MODE")
        go(process)
        wait_until(lambda: waiting(connection), "the batch to be at work")
        process.terminate()
        assert answer(process) == "terminated"
        wait_until(lambda: not waiting(connection), "its statement to be cancelled")
        assert versions(connection) == set()
        assert by_status(connection) == [("pending", 0, sources)]

    assert drain_all(connection).completed == sources

    assert differences(connection) == []


def test_no_row_stays_locked_while_a_batch_waits_for_what_somebody_else_holds(
    connection: Connection, postgres: PostgresDatabase, sources: int
) -> None:
    with postgres.connect() as blocker, postgres.connect() as ours, ThreadPoolExecutor(1) as pool:
        with blocker.transaction():
            blocker.execute("LOCK TABLE fact_turn IN SHARE MODE")
            draining = pool.submit(drain_all, ours)
            wait_until(lambda: waiting(connection), "the batch to wait")
            connection.execute("SET lock_timeout = '5s'")
            connection.execute("SELECT FROM reporting_outbox FOR UPDATE")
        assert draining.result(60).completed == sources


def test_what_a_lost_batch_was_allowed_to_take_others_may(
    ready_world: World, postgres: PostgresDatabase
) -> None:
    connection = ready_world.connection
    org = ready_world.org()
    for _ in range(30):
        ready_world.tool_call(org)
    with postgres.connect() as blocker, ThreadPoolExecutor(1) as pool:
        with blocker.transaction():
            blocker.execute("LOCK TABLE fact_tool_call IN SHARE MODE")
            draining = pool.submit(list, drain_in_parallel(postgres, max_rows=10))
            wait_until(lambda: waiting(connection), "the batch to be at work")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        assert sum(batch.completed for batch in draining.result(60)) == 10


def test_who_is_told_to_stop_while_a_batch_waits_for_a_lock_ends_in_order(
    connection: Connection, postgres: PostgresDatabase, sources: int
) -> None:
    stop = Event()
    with postgres.connect() as blocker, ThreadPoolExecutor(1) as pool, blocker.transaction():
        blocker.execute("LOCK TABLE fact_turn IN SHARE MODE")
        draining = pool.submit(list, drain_in_parallel(postgres, stop=stop, linger_seconds=60))
        wait_until(lambda: waiting(connection), "the batch to wait")
        stop.set()
        assert draining.result(30) == []
    assert by_status(connection) == [("pending", 0, sources)]


def test_no_row_stays_locked_while_a_projector_waits_for_sessions(
    connection: Connection, postgres: PostgresDatabase, sources: int
) -> None:
    sessions = value(connection, "SELECT count(*) FROM sessions")
    with postgres.connect() as other, postgres.connect() as ours, ThreadPoolExecutor(1) as pool:
        with other.transaction():
            lock_sessions(other)
            draining = pool.submit(drain_all, ours)
            wait_until(lambda: waiting(connection), "the projector to wait for sessions")
            left = rows(
                connection,
                "SELECT source_type FROM reporting_outbox WHERE status = 'pending'"
                " FOR UPDATE SKIP LOCKED",
            )
            assert left == [("session",)] * sessions
        assert draining.result(60).completed == sources

    assert differences(connection) == []


def test_a_drain_ends_with_what_was_due_when_it_began(world: World) -> None:
    org = world.org()
    session = world.session(org)
    for _ in range(4):
        world.enqueue(org, "event", world.event(session))

    drained = 0
    for batch in drain(world.connection, max_attempts=MAX_ATTEMPTS, batch_size=1):
        drained += batch.completed
        world.enqueue(org, "event", world.event(session))

    assert drained == 4
    assert by_status(world.connection) == [("completed", 1, 4), ("pending", 0, 4)]


def test_a_drain_that_lingers_takes_what_becomes_due_meanwhile(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    session = world.session(org)
    world.enqueue(org, "event", world.event(session))

    drained = 0
    for batch in drain_in_parallel(postgres, linger_seconds=60):
        drained += batch.completed
        if drained == 3:
            break  # which stops the projectors
        world.enqueue(org, "event", world.event(session))

    assert by_status(world.connection) == [("completed", 1, 3)]
    wait_until(
        lambda: (
            value(
                world.connection,
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
            )
            == 1
        ),
        "the projectors to go",
    )


def test_a_drain_that_lingers_ends_when_it_has_done_as_much_as_it_may(
    ready_world: World, postgres: PostgresDatabase
) -> None:
    org = ready_world.org()
    for _ in range(3):
        ready_world.tool_call(org)

    drained = [b.completed for b in drain_in_parallel(postgres, max_rows=2, linger_seconds=3600)]

    assert sum(drained) == 2


@pytest.fixture
def restricted(ready_world: World, postgres_url: str) -> Iterator[Connection]:
    """A connection as a role that may do everything but insert into fact_turn."""
    role = sql.Identifier(f"role_{uuid4().hex}")
    for statement in (
        "CREATE ROLE {} LOGIN",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO {}",
        "GRANT USAGE ON SCHEMA everruns_pipelines TO {}",
        "GRANT ALL ON ALL TABLES IN SCHEMA everruns_pipelines TO {}",
        "REVOKE INSERT ON fact_turn FROM {}",
    ):
        ready_world.connection.execute(sql.SQL(statement).format(role))
    name = role.as_string(ready_world.connection).strip('"')
    with psycopg.connect(make_conninfo(postgres_url, user=name), autocommit=True) as connection:
        yield connection


@pytest.fixture
def ready_world(connection: Connection) -> World:
    database.prepare(connection)
    return World(connection)


def test_a_refused_write_is_one_clear_error_that_claims_nothing_and_changes_nothing(
    ready_world: World, restricted: Connection
) -> None:
    connection = ready_world.connection
    session = ready_world.session(ready_world.org())
    ready_world.event(session)
    ready_world.event(session, "turn.completed")
    enqueue_all(connection)
    before = rows(connection, "SELECT id, status, attempts, last_error FROM reporting_outbox")

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="fact_turn"):
        drain_all(restricted)

    after = rows(connection, "SELECT id, status, attempts, last_error FROM reporting_outbox")
    assert sorted(after) == sorted(before)
    assert versions(connection) == set()
    assert drain_all(connection).completed == 3


def test_a_write_that_the_role_may_not_do_is_refused_before_anything_is_claimed(
    ready_world: World, restricted: Connection
) -> None:
    with pytest.raises(Refusal, match="INSERT on fact_turn") as refused:
        database.prepare(restricted)

    assert refused.value.code == "permission_denied"


def test_batches_that_deadlock_are_tried_again(ready_world: World) -> None:
    """A foreign transaction holds what the batch wants, and wants what the batch holds."""
    connection = ready_world.connection
    session = ready_world.session(ready_world.org())
    for event_type in ("tool.completed", "turn.completed"):
        ready_world.event(session, event_type)
    materialize(connection)
    connection.execute("UPDATE fact_tool_call SET tool_status = 'stale'")
    connection.execute("UPDATE fact_turn SET turn_status = 'stale'")
    enqueue_all(connection)
    with psycopg.connect(connection.info.dsn) as foreign:
        foreign.execute("SET deadlock_timeout = '60s'")  # the batch is the one that is chosen
        foreign.execute("SELECT FROM fact_turn FOR UPDATE")
        foreign_wants = sql.SQL("SELECT FROM fact_tool_call FOR UPDATE")
        with (
            psycopg.connect(connection.info.dsn, autocommit=True) as watcher,
            ThreadPoolExecutor(1) as executor,
        ):
            draining = executor.submit(drain_all, connection)
            wait_until(lambda: waiting(watcher), "the batch to wait")
            foreign.execute(foreign_wants)
            foreign.commit()
            assert draining.result(30).completed == 3

    assert differences(connection) == []
    assert by_status(connection) == [("completed", 1, 3)]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": 100_001}),
        ("max_rows", {"max_rows": -1}),
        ("linger_seconds", {"linger_seconds": -1}),
        ("linger_seconds", {"linger_seconds": 3601}),
        ("org_id", {"org_id": 4_711}),
    ],
)
def test_a_request_that_cannot_be_done_is_refused_with_the_field_and_what_is_allowed(
    connection: Connection, field: str, options: dict[str, int]
) -> None:
    with pytest.raises(Refusal) as refused:
        check(connection, **options)

    [error] = refused.value.errors
    assert error.loc == (field,)
    assert str(refused.value).startswith(f"{field}: ")


def test_no_rows_are_asked_for_and_none_are_claimed(ready_world: World) -> None:
    ready_world.tool_call(ready_world.org())

    assert drain_all(ready_world.connection, max_rows=0).claimed == 0
    assert by_status(ready_world.connection) == [("pending", 0, 1)]


def test_plans_made_for_empty_tables_read_only_what_they_project_once_the_tables_are_large(
    ready_world: World,
) -> None:
    connection = ready_world.connection
    org = ready_world.org()
    sessions = [ready_world.session(org) for _ in range(40)]
    connection.execute("ANALYZE")
    ready_world.enqueue(org, "event", ready_world.event(sessions[0]))
    batches = drain(connection, max_attempts=MAX_ATTEMPTS, batch_size=1000)
    assert next(batches).completed == 1

    connection.execute(
        "INSERT INTO events (session_id, sequence, event_type, data)"
        " SELECT session, 1000 + number, 'tool.completed', '{\"tool_name\": \"grep\"}'"
        " FROM unnest(%s::uuid[]) AS session, generate_series(1, 500) AS number",
        [sessions],
    )
    connection.execute(
        "INSERT INTO reporting_outbox"
        " (org_id, source_type, source_id, source_version, reason, next_attempt_at)"
        " SELECT %s, 'event', id::text, id::text, 'event_projection', now() - interval '1 hour'"
        " FROM events WHERE sequence > 1000",
        [org],
    )
    before = rows_read(connection)
    assert next(batches).completed == 1000
    read = rows_read(connection) - before
    batches.close()

    assert read < 12 * 1000


def test_plans_made_for_tables_that_nobody_has_analyzed_look_every_row_up_by_its_key(
    ready_world: World,
) -> None:
    connection = ready_world.connection
    org = ready_world.org()
    sessions = [ready_world.session(org) for _ in range(300)]
    due = datetime.now(UTC) - timedelta(hours=1)
    for session in sessions:
        ready_world.enqueue(org, "event", ready_world.event(session), next_attempt_at=due)
        ready_world.enqueue(org, "session", session, next_attempt_at=due)
        generation = ready_world.generation(org, session_id=session)
        ready_world.enqueue(org, "llm_generation", generation, next_attempt_at=due)
    batches = drain(connection, max_attempts=MAX_ATTEMPTS, batch_size=300)
    before = rows_read(connection)
    assert next(batches).completed == 300
    assert next(batches).completed == 300
    assert next(batches).completed == 300
    read = rows_read(connection) - before
    batches.close()

    assert read < 30 * 900


def test_plans_made_while_no_session_had_a_fact_look_each_of_many_up_by_its_key(
    ready_world: World,
) -> None:
    connection = ready_world.connection
    org = ready_world.org()
    first, *others = (ready_world.session(org) for _ in range(301))
    connection.execute("ANALYZE sessions")
    for _ in range(100):
        ready_world.enqueue(org, "event", ready_world.event(first))
    due = datetime.now(UTC) - timedelta(hours=1)
    batches = drain(connection, max_attempts=MAX_ATTEMPTS, batch_size=150)
    assert next(batches).completed == 100

    ready_world.enqueue(org, "session", first, next_attempt_at=due)
    assert next(batches).completed == 1
    for session in others:
        ready_world.enqueue(org, "session", session, next_attempt_at=due)
    assert next(batches).completed == 150
    before = rows_read(connection)
    assert next(batches).completed == 150
    read = rows_read(connection) - before
    batches.close()

    assert read < 20 * 150


def test_plans_made_while_no_capability_had_a_fact_remove_those_of_a_session_by_their_keys(
    ready_world: World,
) -> None:
    connection = ready_world.connection
    org = ready_world.org()
    due = datetime.now(UTC) - timedelta(hours=1)
    session, *_ = (ready_world.session(org) for _ in range(300))
    connection.execute("ANALYZE")
    batches = drain(connection, max_attempts=MAX_ATTEMPTS)
    for version, capabilities in enumerate(("[]", "[]", '["lost"]')):
        connection.execute(
            "UPDATE sessions SET capabilities = %s WHERE id = %s", [capabilities, session]
        )
        ready_world.enqueue(org, "session", session, str(version), next_attempt_at=due)
        assert next(batches).completed == 1
    connection.execute(
        "INSERT INTO fact_capability_usage"
        " SELECT (jsonb_populate_record("
        "fact, jsonb_build_object('source_key', 'event:' || gen_random_uuid(), 'session_id', NULL)"
        ")).* FROM fact_capability_usage AS fact, generate_series(1, 5000)"
    )
    connection.execute("UPDATE sessions SET capabilities = '[]' WHERE id = %s", [session])
    ready_world.enqueue(org, "session", session, "last", next_attempt_at=due)
    before = rows_read(connection)
    assert next(batches).completed == 1
    read = rows_read(connection) - before
    batches.close()

    assert value(connection, "SELECT count(*) FROM fact_capability_usage") == 5000
    assert read < 100


@pytest.mark.parametrize("facts", Facts)
def test_the_sessions_of_a_batch_are_read_once_and_not_once_for_each_event(
    ready_world: World, facts: Facts
) -> None:
    connection = ready_world.connection
    org = ready_world.org()
    for _ in range(30):
        session = ready_world.session(org)
        for _ in range(3):
            ready_world.event(session)
    explain = b"EXPLAIN (ANALYZE, FORMAT JSON) " + writing(projections_of(EVENT), facts)

    with Outbox.opened(connection, MAX_ATTEMPTS), transaction(connection):
        staged = stage(
            connection,
            sql.SQL(
                "SELECT session.org_id, event.id AS source_id"
                " FROM events AS event JOIN sessions AS session ON session.id = event.session_id"
            ),
            {},
        )
        [(plans,)] = RawCursor(connection).execute(explain, [Int4(1), Int4(staged)]).fetchall()

    assert staged == 90
    reads = [node for node in nodes(plans[0]["Plan"]) if node.get("CTE Name") == "source_sessions"]
    assert reads
    assert {(node["Actual Rows"], node["Actual Loops"]) for node in reads} == {(30, 1)}
    assert value(connection, "SELECT count(*) FROM fact_tool_call") == 90


def nodes(plan: dict[str, Any]) -> Generator[dict[str, Any]]:
    """All parts of a plan."""
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)
