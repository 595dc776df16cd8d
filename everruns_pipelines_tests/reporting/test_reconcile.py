"""Days: whatever their state, materializing makes them right; comparing says how they are."""

from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from typing import Any, LiteralString
from uuid import UUID

import pytest
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting import reconcile
from everruns_pipelines.reporting.catalog import FACTS, Fact
from everruns_pipelines.reporting.projector import lock_sessions
from everruns_pipelines.reporting.reconcile import (
    DayReport,
    DayState,
    compare_days,
    materialize_days,
)
from everruns_pipelines.reporting.right_days import right_days
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    DAY,
    NOON,
    TIMES_BEYOND_PYTHON,
    World,
    archive,
    drain_all,
    enqueue_all,
    materialize,
    purge_sessions,
    rows,
    rows_read,
    value,
    versions,
    wait_until,
    waiting,
)

CAPABILITY, SESSION_FACT, TOOL_CALL, TURN = (
    next(fact for fact in FACTS if fact.table == f"fact_{name}")
    for name in ("capability_usage", "session", "tool_call", "turn")
)


def delete_event(connection: Connection, event_id: UUID) -> None:
    with connection.transaction():
        connection.execute("SET LOCAL app.archival_bypass = 'true'")
        connection.execute("DELETE FROM events WHERE id = %s", [event_id])


def compared(connection: Connection, fact: Fact, day: date = DAY) -> DayState:
    return compare_days(connection, fact, day, day)[day]


def materialized(
    connection: Connection, fact: Fact, day: date = DAY, **options: Any
) -> dict[str, int]:
    report = reported(connection, fact, day, **options)
    return {name: number for name, number in report.counts.items() if number}


def reported(connection: Connection, fact: Fact, day: date, **options: Any) -> DayReport:
    [(_, report)] = materialize_days(connection, fact, day, day, **options)
    return report


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
    delete_event(connection, orphan)

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


def test_days_of_tables_that_nobody_has_analyzed_are_compared_session_by_session(
    world: World,
) -> None:
    org = world.org()
    for _ in range(400):
        world.event(world.session(org))
    materialize(world.connection)
    [tool_call] = (fact for fact in FACTS if fact.table == "fact_tool_call")

    before = rows_read(world.connection)
    found = right_days(world.connection, tool_call, DAY, DAY)
    read = rows_read(world.connection) - before

    assert found[DAY].read == 400
    assert read < 20 * 400


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
    report = reported(connection, SESSION_FACT, DAY)

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


def test_an_event_is_an_event_wherever_it_lies(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    event = world.event(session, data={"capability_id": "plain"})
    materialize(connection)
    archive(connection, event)
    of_event = {f"event:{event}", f"event:{event}:invoked"}
    assert compared(connection, TOOL_CALL) == DayState(expected=1)

    connection.execute("DELETE FROM fact_tool_call")
    connection.execute("DELETE FROM fact_capability_usage")
    assert compared(connection, TOOL_CALL) == DayState(expected=1, missing=1)
    materialize(connection, remove_orphans=True)

    assert keys(connection) == {f"session:{session}"} | of_event
    assert differences(connection) == []


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
    purge_sessions(world.connection, *sessions)
    return sessions


def test_orphans_are_counted_and_not_removed_by_default(
    ready: Connection, two_purged_sessions: tuple[UUID, UUID]
) -> None:
    before = versions(ready)

    assert materialize(ready) == {"orphaned": 10}

    assert versions(ready) == before


def test_orphans_of_a_day_are_removed_on_request(
    ready: Connection, two_purged_sessions: tuple[UUID, UUID]
) -> None:
    assert materialize(ready, DAY + timedelta(days=1), remove_orphans=True)["removed"] == 0
    assert len(keys(ready)) == 10

    assert materialize(ready, remove_orphans=True) == {"removed": 10}

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


def test_the_days_of_a_range_are_done_one_by_one(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    days = [DAY + timedelta(days=offset) for offset in range(3)]
    for offset in range(3):
        world.event(session, ts=NOON + timedelta(days=offset))

    for number, (day, report) in enumerate(
        materialize_days(connection, TOOL_CALL, days[0], days[-1]), start=1
    ):
        assert (day, report.counts["inserted"]) == (days[number - 1], 1)
        assert value(connection, "SELECT count(*) FROM fact_tool_call") == number


def test_days_that_differ_are_told_among_days_that_are_right(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    days = [DAY + timedelta(days=offset) for offset in range(4)]
    events = [world.event(session, ts=NOON + timedelta(days=offset)) for offset in (0, 1, 1, 3)]
    materialize(connection, days[0], days[-1])
    connection.execute("DELETE FROM fact_tool_call WHERE source_key = %s", [f"event:{events[1]}"])
    connection.execute(
        "UPDATE fact_tool_call SET duration_ms = 5 WHERE source_key = %s", [f"event:{events[3]}"]
    )

    assert compare_days(connection, TOOL_CALL, days[0], days[-1]) == {
        days[0]: DayState(expected=1),
        days[1]: DayState(expected=2, missing=1),
        days[2]: DayState(),
        days[3]: DayState(expected=1, stale=1),
    }
    reports = dict(materialize_days(connection, TOOL_CALL, days[0], days[-1]))
    assert [dict(+reports[day].counts) for day in days] == [
        {"read": 1, "unchanged": 1},
        {"read": 2, "inserted": 1, "unchanged": 1},
        {},
        {"read": 1, "refreshed": 1},
    ]
    assert compare_days(connection, TOOL_CALL, days[0], days[-1])[days[3]] == DayState(expected=1)


@pytest.mark.parametrize("change", ["DELETE FROM {}", "UPDATE {} SET reason = 'other'"])
def test_a_right_day_is_materialized_if_what_was_rejected_is_not_on_record(
    world: World, change: LiteralString
) -> None:
    connection = world.connection
    world.event(world.session(world.org()), data={"capability_id": None})
    materialize(connection)
    rejections = "SELECT source_key, reason FROM everruns_pipelines.fact_rejections"
    on_record = rows(connection, rejections)
    assert len(on_record) == 1
    connection.execute(change.format("everruns_pipelines.fact_rejections"))

    assert materialized(connection, CAPABILITY) == {"read": 1, "rejected": 1}

    assert rows(connection, rejections) == on_record
    connection.execute(
        "INSERT INTO everruns_pipelines.fact_rejections (fact, org_id, source_key, reason, written)"
        " SELECT 'fact_tool_call', org_id, source_key, 'settled', true FROM fact_tool_call"
    )
    materialized(connection, TOOL_CALL)
    assert rows(connection, rejections) == on_record


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


def test_facts_of_sources_that_arrive_while_a_day_is_looked_at_stay(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running day is materialized while projectors go on."""
    connection = world.connection
    session = world.session(world.org())
    world.event(session)
    late: list[UUID] = []
    stage_days = reconcile.stage_days

    def staged_and_then_projected(*arguments: Any) -> None:
        stage_days(*arguments)
        late.append(world.event(session))
        enqueue_all(connection)
        drain_all(connection)

    monkeypatch.setattr(reconcile, "stage_days", staged_and_then_projected)

    state = compared(connection, TOOL_CALL)
    connection.execute("DELETE FROM fact_tool_call WHERE source_key = %s", [f"event:{late[0]}"])
    report = reported(connection, TOOL_CALL, DAY)

    assert state.superseded == report.counts["removed"] == report.counts["orphaned"] == 0
    assert f"event:{late[1]}" in keys(connection)
    monkeypatch.undo()
    materialize(connection)
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
    world.session(org, capabilities='["something to do"]')
    world.enqueue(org, "session", session)
    configure = "UPDATE sessions SET capabilities = %s WHERE id = %s"

    def lose(*_: int) -> None:
        connection.execute(configure, ["[]", session])

    with postgres.connect() as blocker, ThreadPoolExecutor(2) as executor:
        with blocker.transaction():
            blocker.execute("SELECT FROM fact_capability_usage FOR UPDATE")
            removing = executor.submit(materialized_apart, postgres, CAPABILITY, on_step=lose)
            wait_until(lambda: waiting(connection) == 1, "the row to be about to be removed")
            connection.execute(configure, ['["back"]', session])
            projecting = executor.submit(drained_apart, postgres)
            wait_until(lambda: waiting(connection) == 2 or projecting.done(), "the projector")
        removing.result(30)
        assert projecting.result(30) == 1

    materialize(connection)
    assert differences(connection) == []


def test_removing_leftovers_is_tried_again_when_it_deadlocks(
    world: World, postgres: PostgresDatabase
) -> None:
    """A projector holds the row that is left over, and waits for its turn at the sessions."""
    connection = world.connection
    org = world.org()
    session = world.session(org, capabilities='["lost"]')
    materialize(connection)
    world.session(org, capabilities='["new"]')

    def lose(*_: int) -> None:
        connection.execute("UPDATE sessions SET capabilities = '[]' WHERE id = %s", [session])

    with postgres.connect() as foreign, ThreadPoolExecutor(1) as executor:
        foreign.execute("SET deadlock_timeout = '60s'")  # the day is the one that is chosen
        with foreign.transaction():
            foreign.execute("SELECT FROM fact_capability_usage FOR UPDATE")
            removing = executor.submit(materialized_apart, postgres, CAPABILITY, on_step=lose)
            wait_until(lambda: waiting(connection) == 1, "the day to wait")
            lock_sessions(foreign)
        assert removing.result(30) == {"read": 2, "inserted": 1, "unchanged": 1, "removed": 1}

    materialize(connection)
    assert not any(key.endswith(":lost") for key in keys(connection))
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
