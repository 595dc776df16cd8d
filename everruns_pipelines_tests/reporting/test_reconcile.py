"""Days: whatever their state, materializing makes them right; comparing says how they are."""

from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from typing import Any
from uuid import UUID

import pytest
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting import reconcile
from everruns_pipelines.reporting.catalog import FACTS, Fact
from everruns_pipelines.reporting.projector import lock_sessions
from everruns_pipelines.reporting.reconcile import (
    DayState,
    compare_day,
    materialize_day,
    stage_days,
)
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    DAY,
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

CAPABILITY, SESSION_FACT, TOOL_CALL, TURN = (
    next(fact for fact in FACTS if fact.table == f"fact_{name}")
    for name in ("capability_usage", "session", "tool_call", "turn")
)
ARCHIVE = (
    "INSERT INTO archived_events (id, session_id, sequence, event_type, data, ts, context,"
    " created_at) SELECT id, session_id, sequence, event_type, data, ts, context, created_at"
    " FROM events WHERE id = %s"
)


def delete_event(connection: Connection, event_id: UUID, *, archive: bool) -> None:
    with connection.transaction():
        connection.execute("SET LOCAL app.archival_bypass = 'true'")
        if archive:
            connection.execute(ARCHIVE, [event_id])
        connection.execute("DELETE FROM events WHERE id = %s", [event_id])


def compared(connection: Connection, fact: Fact, day: date = DAY) -> DayState:
    stage_days(connection, fact, day, day)
    return compare_day(connection, fact, day)


def materialized(
    connection: Connection, fact: Fact, day: date = DAY, **options: Any
) -> dict[str, int]:
    stage_days(connection, fact, day, day)
    report = materialize_day(connection, fact, day, **options)
    return {name: number for name, number in report.counts.items() if number}


def keys(connection: Connection) -> set[str]:
    return {key for *_, key in versions(connection)}


def test_a_range_of_days_is_made_right_from_nothing_and_again_changes_nothing(
    ready: Connection,
) -> None:
    load_adversarial_sources(ready, seed=6, sessions=10, events_per_session=12)
    days = rows(
        ready,
        "SELECT (ts AT TIME ZONE 'UTC')::date FROM events"
        " UNION SELECT (created_at AT TIME ZONE 'UTC')::date FROM sessions"
        " UNION SELECT (created_at AT TIME ZONE 'UTC')::date FROM llm_generations"
        " UNION SELECT (created_at AT TIME ZONE 'UTC')::date FROM usage_ledger",
    )
    for (day,) in days:
        materialize(ready, day)

    assert differences(ready) == []
    before = versions(ready)
    again = materialize(ready, DAY, DAY + timedelta(days=1))
    assert again["read"] == again["unchanged"] + again["rejected"] > 0
    assert versions(ready) == before


def test_missing_stale_superseded_misplaced_and_orphaned_rows_are_counted_and_made_right(
    world: World,
) -> None:
    connection = world.connection
    session = world.session(world.org())
    missing, stale, misplaced, orphan, right = (world.event(session) for _ in range(5))
    materialized(connection, TOOL_CALL)
    connection.execute("DELETE FROM fact_tool_call WHERE source_key = %s", [f"event:{missing}"])
    connection.execute(
        "UPDATE fact_tool_call SET tool_name = 'x' WHERE source_key = %s", [f"event:{stale}"]
    )
    connection.execute(
        "UPDATE fact_tool_call SET time_bucket_day = time_bucket_day + 1 WHERE source_key = %s",
        [f"event:{misplaced}"],
    )
    connection.execute(
        "INSERT INTO fact_tool_call SELECT (fact).* FROM (SELECT jsonb_populate_record(fact,"
        " jsonb_build_object('source_key', fact.source_key || ':nobody')) AS fact"
        " FROM fact_tool_call AS fact WHERE source_key = %s) AS copied",
        [f"event:{right}"],
    )
    delete_event(connection, orphan, archive=False)

    # The misplaced row is stale to both days: to its own and to the one in which it stands.
    assert compared(connection, TOOL_CALL) == DayState(
        expected=4, missing=1, stale=2, superseded=1, orphaned=1
    )
    next_day = DAY + timedelta(days=1)
    assert compared(connection, TOOL_CALL, next_day) == DayState(
        expected=1, missing=0, stale=1, superseded=0, orphaned=0
    )

    assert materialized(connection, TOOL_CALL) == {
        "read": 4,
        "inserted": 1,
        "refreshed": 2,
        "unchanged": 1,
        "removed": 1,
        "orphaned": 1,
    }
    assert compared(connection, TOOL_CALL) == DayState(4, 0, 0, 0, 1)
    assert compared(connection, TOOL_CALL, next_day) == DayState(0, 0, 0, 0, 0)
    assert differences(connection, orphans=True) == [
        f"fact_session 1 session:{session}: missing",
    ]


def test_a_row_that_stands_in_the_wrong_day_is_found_from_there(world: World) -> None:
    connection = world.connection
    world.event(world.session(world.org()))
    materialize(connection)
    connection.execute("UPDATE fact_tool_call SET time_bucket_day = '2026-02-01'")

    assert materialized(connection, TOOL_CALL, date(2026, 2, 1))["refreshed"] == 1

    assert differences(connection) == []


@pytest.mark.parametrize(
    ("started", "finished", "storable"),
    [
        ("4713-01-01 BC", "294276-12-31", True),
        ("infinity", "2026-03-01", True),
        ("-infinity", "2026-03-01", False),
        ("2026-03-01", "infinity", False),
        ("infinity", "infinity", False),
    ],
)
def test_a_session_of_any_length_is_compared_and_only_an_infinite_one_lacks_its_fact(
    world: World, started: str, finished: str, storable: bool
) -> None:
    connection = world.connection
    org = world.org()
    world.session(org)
    odd = world.session(org, started_at=started, finished_at=finished)
    lacking = 0 if storable else 1

    assert compared(connection, SESSION_FACT) == DayState(2, 2, 0, 0, 0)
    stage_days(connection, SESSION_FACT, DAY, DAY)
    report = materialize_day(connection, SESSION_FACT, DAY)

    assert compared(connection, SESSION_FACT) == DayState(2, lacking, 0, 0, 0)
    assert [failure.source_id for failure in report.failures] == [str(odd)] * lacking


@pytest.mark.parametrize("time", TIMES_BEYOND_PYTHON)
def test_a_fact_that_stands_in_the_wrong_day_is_put_right_whatever_its_own_day(
    world: World, time: str
) -> None:
    connection = world.connection
    world.event(world.session(world.org()), ts=time)
    enqueue_all(connection)
    drain_all(connection)
    connection.execute("UPDATE fact_tool_call SET time_bucket_day = %s", [DAY])
    assert compared(connection, TOOL_CALL).stale == 1

    assert materialized(connection, TOOL_CALL) == {"read": 1, "refreshed": 1}

    right = "SELECT time_bucket_day = (ts AT TIME ZONE 'UTC')::date FROM fact_tool_call, events"
    assert value(connection, right)


def test_comparing_a_day_writes_nothing(world: World) -> None:
    world.event(world.session(world.org()))
    before = versions(world.connection)

    for fact in FACTS:
        compared(world.connection, fact)

    assert versions(world.connection) == before == set()


def test_each_fact_writes_its_own_table_only(world: World) -> None:
    session = world.session(world.org(), capabilities='["plain"]')
    event = world.event(session, data={"capability_id": "plain"})

    materialized(world.connection, TOOL_CALL)

    assert keys(world.connection) == {f"event:{event}"}


def test_facts_of_archived_events_stay(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    event = world.event(session, data={"capability_id": "plain"})
    materialize(connection)
    delete_event(connection, event, archive=True)

    materialize(connection, remove_orphans=True)

    assert keys(connection) == {f"session:{session}", f"event:{event}", f"event:{event}:invoked"}
    assert compared(connection, TOOL_CALL) == DayState(0, 0, 0, 0, 0)


@pytest.fixture
def two_purged_sessions(world: World) -> tuple[UUID, UUID]:
    """Sessions with facts of every kind that were then deleted."""
    org = world.org()
    sessions = (world.session(org, capabilities='["a"]'), world.session(org, capabilities='["b"]'))
    for session in sessions:
        world.event(session)
        world.event(session, "turn.failed")
        world.generation(org, session)
    enqueue_all(world.connection)
    drain_all(world.connection)
    assert len(keys(world.connection)) == 10
    with world.connection.transaction():
        world.connection.execute("SET LOCAL app.session_purge = 'true'")
        world.connection.execute("DELETE FROM sessions")
    return sessions


def test_orphans_are_counted_and_not_removed_by_default(
    ready: Connection, two_purged_sessions: tuple[UUID, UUID]
) -> None:
    before = versions(ready)

    assert materialize(ready) == {"removed": 0, "orphaned": 10}

    assert versions(ready) == before


def test_orphans_of_a_day_are_removed_on_request(
    ready: Connection, two_purged_sessions: tuple[UUID, UUID]
) -> None:
    assert materialize(ready, DAY + timedelta(days=1), remove_orphans=True)["removed"] == 0
    assert len(keys(ready)) == 10

    assert materialize(ready, remove_orphans=True) == {"removed": 10, "orphaned": 0}

    assert keys(ready) == set()


def test_orphans_of_one_session_are_removed_on_request(
    ready: Connection, two_purged_sessions: tuple[UUID, UUID]
) -> None:
    removed, kept = two_purged_sessions

    counts = materialize(ready, remove_orphans=True, session_id=str(removed))

    assert counts == {"removed": 5, "orphaned": 5}
    for fact in FACTS:
        others = sql.SQL("SELECT FROM {} WHERE session_id <> %s").format(sql.Identifier(fact.table))
        assert ready.execute(others, [kept]).fetchall() == []


def test_a_capability_that_is_no_longer_configured_is_superseded(world: World) -> None:
    connection = world.connection
    session = world.session(world.org(), capabilities='["kept", "removed"]')
    materialize(connection)
    connection.execute('UPDATE sessions SET capabilities = \'["kept", {"ref": "new"}]\'')

    assert compared(connection, CAPABILITY) == DayState(
        expected=2, missing=1, stale=0, superseded=1, orphaned=0
    )
    counts = materialized(connection, CAPABILITY)

    assert counts == {"read": 2, "inserted": 1, "unchanged": 1, "removed": 1}
    assert keys(connection) == {
        f"session:{session}",
        f"session:{session}:configured:session:kept",
        f"session:{session}:configured:session:new",
    }


def test_rejections_go_with_the_superseded_row_that_they_are_about(world: World) -> None:
    connection = world.connection
    event = world.event(world.session(world.org()), data={"tool_name": "t"})
    materialize(connection)
    connection.execute(
        "UPDATE fact_tool_call SET source_key = source_key || ':nobody' WHERE source_key = %s",
        [f"event:{event}"],
    )
    connection.execute(
        "INSERT INTO everruns_pipelines.fact_rejections (fact, org_id, source_key, reason, written)"
        " SELECT 'fact_tool_call', org_id, source_key, 'odd', true FROM fact_tool_call"
    )

    materialize(connection)

    assert value(connection, "SELECT count(*) FROM everruns_pipelines.fact_rejections") == 0
    assert differences(connection) == []


def test_a_range_is_staged_once_and_its_days_are_done_one_by_one(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    days = [DAY + timedelta(days=offset) for offset in range(3)]
    for offset in range(3):
        world.event(session, ts=NOON + timedelta(days=offset))

    stage_days(connection, TOOL_CALL, days[0], days[-1])

    staged = rows(connection, "SELECT day, count(*) FROM pg_temp.day_sources GROUP BY 1 ORDER BY 1")
    assert staged == [(day, 1) for day in days]
    for day in days:
        assert materialize_day(connection, TOOL_CALL, day).counts["inserted"] == 1
        found = value(
            connection, "SELECT count(*) FROM fact_tool_call WHERE time_bucket_day = %s", day
        )
        assert found == 1


def test_a_day_of_many_steps_is_the_same_as_one_of_one_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "_STEP", 4)
    session = world.session(world.org())
    for _ in range(10):
        world.event(session)
    steps: list[tuple[int, int]] = []

    def on_step(done: int, total: int) -> None:
        steps.append((done, total))

    counts = materialized(world.connection, TOOL_CALL, on_step=on_step)

    assert counts == {"read": 10, "inserted": 10}
    assert steps == [(4, 10), (8, 10), (10, 10)]


def test_facts_of_sources_that_arrive_while_a_day_is_materialized_stay(world: World) -> None:
    """A running day is materialized while projectors go on."""
    connection = world.connection
    session = world.session(world.org())
    world.event(session)
    stage_days(connection, TOOL_CALL, DAY, DAY)
    late = world.event(session)
    enqueue_all(connection)
    drain_all(connection)

    state = compare_day(connection, TOOL_CALL, DAY)
    report = materialize_day(connection, TOOL_CALL, DAY)

    assert state.superseded == report.counts["removed"] == report.counts["orphaned"] == 0
    assert f"event:{late}" in keys(connection)
    assert differences(connection) == []


def test_a_capability_that_is_configured_again_while_its_day_is_materialized_stays(
    world: World, postgres: PostgresDatabase
) -> None:
    connection = world.connection
    session = world.session(world.org(), capabilities='["back"]')
    materialize(connection)
    configure = "UPDATE sessions SET capabilities = %s WHERE id = %s"
    connection.execute(configure, ["[]", session])
    world.enqueue(1, "session", session)
    [fact] = rows(connection, "SELECT org_id, source_key FROM fact_capability_usage")

    with postgres.connect() as blocker, ThreadPoolExecutor(2) as executor:
        with blocker.transaction():
            blocker.execute(
                "SELECT FROM fact_capability_usage WHERE (org_id, source_key) = (%s, %s)"
                " FOR UPDATE",
                fact,
            )
            materializing = executor.submit(materialized_apart, postgres, CAPABILITY)
            wait_until(lambda: waiting(connection) == 1, "the day to be about to remove the row")
            connection.execute(configure, ['["back"]', session])
            draining = executor.submit(drained_apart, postgres)
            wait_until(lambda: waiting(connection) == 2 or draining.done(), "the projector")
        materializing.result(30)
        assert draining.result(30) == 1

    assert differences(connection) == []


def test_a_capability_that_is_configured_again_while_leftovers_are_removed_stays(
    world: World, postgres: PostgresDatabase
) -> None:
    """It was lost after the day's last step, so that only the removal of leftovers sees it gone."""
    connection = world.connection
    org = world.org()
    session = world.session(org, capabilities='["back"]')
    materialize(connection)
    world.enqueue(org, "session", session)
    configure = "UPDATE sessions SET capabilities = %s"

    def lose(*_: int) -> None:
        connection.execute(configure, ["[]"])

    with postgres.connect() as blocker, ThreadPoolExecutor(2) as executor:
        with blocker.transaction():
            blocker.execute("SELECT FROM fact_capability_usage FOR UPDATE")
            removing = executor.submit(materialized_apart, postgres, CAPABILITY, on_step=lose)
            wait_until(lambda: waiting(connection) == 1, "the row to be about to be removed")
            connection.execute(configure, ['["back"]'])
            projecting = executor.submit(drained_apart, postgres)
            wait_until(lambda: waiting(connection) == 2 or projecting.done(), "the projector")
        removing.result(30)
        assert projecting.result(30) == 1

    assert differences(connection) == []


def test_removing_leftovers_is_tried_again_when_it_deadlocks(
    world: World, postgres: PostgresDatabase
) -> None:
    """A projector holds the row that is left over, and waits for its turn at the sessions."""
    connection = world.connection
    session = world.session(world.org(), capabilities='["lost"]')
    materialize(connection)

    def lose(*_: int) -> None:
        connection.execute("UPDATE sessions SET capabilities = '[]'")

    with postgres.connect() as foreign, ThreadPoolExecutor(1) as executor:
        foreign.execute("SET deadlock_timeout = '60s'")  # the day is the one that is chosen
        with foreign.transaction():
            foreign.execute("SELECT FROM fact_capability_usage FOR UPDATE")
            removing = executor.submit(materialized_apart, postgres, CAPABILITY, on_step=lose)
            wait_until(lambda: waiting(connection) == 1, "the day to wait")
            lock_sessions(foreign)
        assert removing.result(30) == {"read": 1, "unchanged": 1, "removed": 1}

    materialize(connection)
    assert keys(connection) == {f"session:{session}"}
    assert differences(connection) == []


def test_a_day_that_deadlocks_is_tried_again(world: World, postgres: PostgresDatabase) -> None:
    """A foreign transaction holds what the day wants, and wants what the day holds."""
    connection = world.connection
    session = world.session(world.org())
    first, second = sorted(f"event:{world.event(session)}" for _ in range(2))
    materialize(connection)
    connection.execute("UPDATE fact_tool_call SET tool_status = 'stale'")
    lock_fact = "SELECT FROM fact_tool_call WHERE source_key = %s FOR UPDATE"

    with postgres.connect() as foreign, ThreadPoolExecutor(1) as executor:
        foreign.execute("SET deadlock_timeout = '60s'")  # the day is the one that is chosen
        with foreign.transaction():
            foreign.execute(lock_fact, [second])
            materializing = executor.submit(materialized_apart, postgres, TOOL_CALL)
            wait_until(lambda: waiting(connection) == 1, "the day to wait")
            foreign.execute(lock_fact, [first])
        assert materializing.result(30) == {"read": 2, "refreshed": 2}

    assert differences(connection) == []


def materialized_apart(postgres: PostgresDatabase, fact: Fact, **options: Any) -> dict[str, int]:
    """What `materialized` tells, on a connection of its own."""
    with postgres.connect() as own:
        return materialized(own, fact, **options)


def drained_apart(postgres: PostgresDatabase) -> int:
    """How many rows were completed, on a connection of its own."""
    with postgres.connect() as own:
        return drain_all(own).completed
