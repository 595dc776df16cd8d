"""The rules of the backfill: what it enqueues, and what it leaves out because it is not missing."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, LiteralString, cast

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting import backfill
from everruns_pipelines.reporting.backfill import (
    GLOBAL_LOCK,
    BackfillRequest,
    Missing,
    enqueue,
    look,
)
from everruns_pipelines.reporting.catalog import EVENT, FACTS, Fact, Projection
from everruns_pipelines.reporting.database import ensure_schema
from everruns_pipelines.reporting.drain import drain
from everruns_pipelines.reporting.missing import find_missing
from everruns_pipelines.reporting.query import EVERYTHING, projected_rows, selected_rows
from everruns_pipelines_tests.reporting.adversarial import (
    load_adversarial_sources,
    load_unstorable_sources,
)
from everruns_pipelines_tests.reporting.recompute import (
    actual_facts,
    differences,
    expected_facts,
)
from everruns_pipelines_tests.reporting.world import (
    NOON,
    TIMES_BEYOND_PYTHON,
    World,
    drain_all,
    enqueue_all,
    wait_until,
    waiting,
)

NOTHING = {"enqueued": 0, "events": 0, "llm_generations": 0, "sessions": 0, "usage_ledger": 0}
EVERY_TYPE = ("event", "llm_generation", "session", "usage_ledger")
COUNTED_AS = {
    "event": "events",
    "llm_generation": "llm_generations",
    "session": "sessions",
    "usage_ledger": "usage_ledger",
}


@pytest.fixture(scope="module")
def projected(home: Path) -> Iterator[Connection]:
    """A database of sample data with all its facts, and an empty outbox."""
    admin_url = embedded_postgres_url(home, "postgres")
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE backfill TEMPLATE everruns STRATEGY FILE_COPY")
        url = embedded_postgres_url(home, "backfill")
        with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
            _load_projected_sample(connection)
            yield connection
        admin.execute("DROP DATABASE backfill WITH (FORCE)")


@pytest.fixture
def world(projected: Connection) -> Iterator[Connection]:
    """The database, as it was again after the test."""
    with projected.transaction(force_rollback=True):
        yield projected


def _load_projected_sample(connection: Connection) -> None:
    load_sample_data(
        connection,
        events=1200,
        days=3,
        until=datetime(2026, 3, 4, tzinfo=UTC),
        enqueued_share=0,
    )
    ensure_schema(connection)
    for fact in FACTS:
        columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in fact.columns)
        for projection in fact.projections:
            connection.execute(
                sql.SQL(
                    "INSERT INTO {} ({}) SELECT {} FROM ({}) AS projected WHERE rejected IS NULL"
                ).format(
                    sql.Identifier(fact.table),
                    columns,
                    columns,
                    projected_rows(fact, projection, EVERYTHING),
                )
            )


def _backfill(connection: Connection, **request: Any) -> dict[str, int]:
    return enqueue(connection, BackfillRequest(**request), lock_wait_seconds=0.05)


def _outbox(connection: Connection) -> list[tuple[str, str, str]]:
    """Source type, source id and status of every row."""
    rows = connection.execute(
        "SELECT source_type, source_id, status FROM reporting_outbox ORDER BY 1, 2, source_version"
    )
    return [(source_type, source_id, status) for source_type, source_id, status in rows]


def _pending(connection: Connection) -> set[tuple[str, str]]:
    return {(kind, id_) for kind, id_, status in _outbox(connection) if status == "pending"}


def _value(connection: Connection, query: LiteralString, *parameters: object) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def _lose(connection: Connection, table: str, count: int, where: str = "true") -> set[str]:
    """Delete facts as if by hand, of the oldest sources; the ids of these."""
    rows = connection.execute(
        sql.SQL(
            "DELETE FROM {0} WHERE (org_id, source_key) IN (SELECT org_id, source_key FROM {0}"
            " WHERE {1} ORDER BY created_at, source_key LIMIT {2}) RETURNING source_key"
        ).format(sql.Identifier(table), sql.SQL(cast("LiteralString", where)), sql.Literal(count))
    )
    return {key.split(":")[1] for (key,) in rows}


def _change(connection: Connection, table: str, where: str, statement: LiteralString) -> str:
    """Change one fact, which `where` finds; the id of its source."""
    one = sql.SQL(
        "(org_id, source_key) = (SELECT org_id, source_key FROM {} WHERE {}"
        " ORDER BY created_at, source_key LIMIT 1)"
    ).format(sql.Identifier(table), sql.SQL(cast("LiteralString", where)))
    row = connection.execute(sql.SQL(statement).format(sql.Identifier(table), one)).fetchone()
    assert row is not None
    return row[0].split(":")[1]


def _drain(connection: Connection) -> None:
    for _ in drain(connection, max_attempts=12):
        pass


# What is refused.


@pytest.mark.parametrize("limit", [0, -1, 10_001, "many", "10", 1.0, True, None])
def test_a_limit_that_is_no_whole_number_from_1_to_10000_is_refused(
    world: Connection, limit: Any
) -> None:
    _lose(world, "fact_turn", 1)
    with pytest.raises(Refusal, match=r"limit: expected a whole number from 1 to 10000") as caught:
        _backfill(world, limit=limit)
    assert caught.value.as_problem_details()["status"] == 400
    assert _outbox(world) == []


@pytest.mark.parametrize("source_types", [["events"], ["event", "span"], "event", [], [None], 7])
def test_an_unknown_source_type_is_refused_and_the_allowed_are_named(
    world: Connection, source_types: Any
) -> None:
    with pytest.raises(Refusal, match="event, llm_generation, session, usage_ledger"):
        _backfill(world, source_types=source_types)


@pytest.mark.parametrize("org_id", [True, "1", 1.0])
def test_an_organization_that_is_no_number_is_refused(world: Connection, org_id: Any) -> None:
    with pytest.raises(Refusal, match="org_id: expected"):
        _backfill(world, org_id=org_id)


@pytest.mark.parametrize("org_id", [0, -1, 999, 2**70])
def test_an_organization_that_does_not_exist_is_refused(world: Connection, org_id: int) -> None:
    with pytest.raises(Refusal, match=f"there is no organization {org_id}") as caught:
        _backfill(world, org_id=org_id)
    assert (caught.value.code, caught.value.status) == ("not_found_error", 404)


@pytest.mark.parametrize("dry_run", [None, "no", 1])
def test_a_dry_run_that_is_neither_true_nor_false_is_refused(
    world: Connection, dry_run: Any
) -> None:
    with pytest.raises(Refusal, match="dry_run: expected true or false"):
        _backfill(world, dry_run=dry_run)


# What is missing.


def test_nothing_is_enqueued_where_nothing_is_missing(world: Connection) -> None:
    assert _backfill(world) == NOTHING
    assert _outbox(world) == []


LOSSES = (
    ("fact_llm_generation", "true", "llm_generation"),
    ("fact_tool_call", "true", "event"),
    ("fact_turn", "true", "event"),
    ("fact_session", "true", "session"),
    ("fact_budget_posting", "true", "usage_ledger"),
    ("fact_capability_usage", "source_key LIKE '%:invoked'", "event"),
    ("fact_capability_usage", "source_key LIKE '%:capability_usage:1'", "event"),
    ("fact_capability_usage", "source_key LIKE '%:effect_ran'", "event"),
    ("fact_capability_usage", "source_key LIKE 'session:%'", "session"),
)


@pytest.mark.parametrize(("table", "where", "source_type"), LOSSES)
@pytest.mark.parametrize("count", [1, 7])
def test_a_fact_deleted_by_hand_is_missing(
    world: Connection, table: str, where: str, source_type: str, count: int
) -> None:
    lost = _lose(world, table, count, where)
    assert lost
    result = _backfill(world)
    assert result == NOTHING | {"enqueued": len(lost), COUNTED_AS[source_type]: len(lost)}
    assert _pending(world) == {(source_type, id_) for id_ in lost}


@pytest.mark.parametrize("most", [1, 2, 999])
def test_all_that_a_session_lacks_of_several_facts_is_missing(world: Connection, most: int) -> None:
    session = _value(
        world,
        "SELECT session_id FROM fact_capability_usage GROUP BY 1"
        " ORDER BY count(DISTINCT capability_usage_kind) DESC, session_id LIMIT 1",
    )
    lost = set[str]()
    for table, where, source_type in LOSSES:
        if source_type in ("event", "session"):
            lost |= _lose(world, table, most, f"session_id = '{session}' AND {where}")
    assert len(lost) > 3
    _backfill(world)
    assert {id_ for _, id_ in _pending(world)} == lost


@pytest.mark.parametrize(("table", "where", "source_type"), LOSSES)
def test_a_fact_moved_to_another_organization_is_missing(
    world: Connection, table: str, where: str, source_type: str
) -> None:
    lost = _lose(world, table, 1, where)
    moved = _change(
        world, table, where, "UPDATE {} SET org_id = org_id % 3 + 1 WHERE {} RETURNING source_key"
    )
    _backfill(world)
    assert _pending(world) == {(source_type, id_) for id_ in {moved, *lost}}


def test_a_fact_that_names_another_session_is_not_missing(world: Connection) -> None:
    world.execute(
        "UPDATE fact_turn SET session_id = NULL WHERE source_key = 'event:'"
        " || (SELECT id FROM events WHERE event_type = 'turn.completed' LIMIT 1)"
    )
    assert _backfill(world) == NOTHING
    world.execute("UPDATE fact_turn SET session_id = NULL")
    world.execute("UPDATE fact_tool_call SET session_id = gen_random_uuid()")
    assert _backfill(world) == NOTHING


def _archive(connection: Connection, where: LiteralString) -> None:
    """What retention does with the events of the condition."""
    connection.execute("SET LOCAL app.archival_bypass = 'true'")
    connection.execute(
        f"WITH old AS (DELETE FROM events WHERE {where} RETURNING *)"
        " INSERT INTO archived_events SELECT old.*, now() FROM old"
    )


def test_a_fact_of_an_archived_event_is_missing_if_it_is_lost(world: Connection) -> None:
    _archive(world, "sequence % 3 = 0")
    world.execute("DELETE FROM usage_ledger WHERE amount < 0.01")
    assert _backfill(world, source_types=["event", "llm_generation", "usage_ledger"]) == NOTHING
    archived = "EXISTS (SELECT FROM archived_events WHERE source_key LIKE 'event:' || id || '%')"
    lost: set[str] = set()
    for where in (archived, f"NOT {archived}"):
        for table in ("fact_turn", "fact_tool_call"):
            lost |= _lose(world, table, 4, where)
    assert len(lost) == 16
    assert _backfill(world, source_types=["event"])["events"] == 16
    assert {id_ for _, id_ in _pending(world)} == lost


def test_a_session_whose_events_were_archived_is_stale_and_keeps_its_history(
    world: Connection,
) -> None:
    history = "SELECT sum(turn_count), sum(tool_call_count) FROM fact_session"
    before = world.execute(history).fetchone()
    _archive(world, "ts < (SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY ts) FROM events)")
    stale = _value(world, "SELECT count(*) FROM sessions WHERE updated_at = now()")
    assert _backfill(world) == NOTHING | {"enqueued": stale, "sessions": stale}
    _drain(world)
    assert differences(world) == []
    assert world.execute(history).fetchone() == before


def test_postings_of_a_purged_session_are_stale_and_nothing_of_it_is_missing(
    world: Connection,
) -> None:
    world.execute("SET LOCAL app.session_purge = 'true'")
    session = "(SELECT session_id FROM usage_ledger ORDER BY session_id LIMIT 1)"
    postings = _value(world, f"SELECT count(*) FROM usage_ledger WHERE session_id = {session}")
    world.execute(f"DELETE FROM sessions WHERE id = {session}")
    assert _backfill(world) == NOTHING | {"enqueued": postings, "usage_ledger": postings}
    _drain(world)
    assert differences(world, orphans=True) == []


def test_postings_of_a_budget_that_was_re_keyed_are_stale(world: Connection) -> None:
    budget = _value(
        world,
        "UPDATE budgets SET subject_type = 'agent_trigger', subject_id = 'trigger'"
        " WHERE id = (SELECT budget_id FROM usage_ledger LIMIT 1) RETURNING id",
    )
    postings = _value(world, "SELECT count(*) FROM usage_ledger WHERE budget_id = %s", budget)
    assert _backfill(world) == NOTHING | {"enqueued": postings, "usage_ledger": postings}
    _drain(world)
    assert differences(world) == []
    assert _backfill(world) == NOTHING


def test_usage_records_that_are_no_array_and_rejected_elements_are_not_missing(
    world: Connection,
) -> None:
    world.execute("SET LOCAL session_replication_role = replica")
    for number, data in enumerate(
        (
            '{"records": {"capability_id": "a", "usage_kind": "invoked"}}',
            '{"records": [{"capability_id": null, "usage_kind": "invoked"}]}',
            '{"records": [{"capability_id": "a", "usage_kind": "used"}, 7, {}]}',
            "{}",
        )
    ):
        world.execute(
            "INSERT INTO events (session_id, sequence, event_type, data)"
            " SELECT id, %s, 'capability.usage', %s FROM sessions LIMIT 1",
            [100_000 + number, data],
        )
    assert _backfill(world) == NOTHING


# What is stale.


def test_a_session_that_changed_after_its_projection_is_stale(world: Connection) -> None:
    changed = str(
        _value(
            world,
            "UPDATE sessions SET title = 'x' WHERE id ="
            " (SELECT max(id::text)::uuid FROM sessions) RETURNING id",
        )
    )
    assert _backfill(world) == NOTHING | {"enqueued": 1, "sessions": 1}
    assert _pending(world) == {("session", changed)}


@pytest.mark.parametrize(
    "change", ["input_tokens = input_tokens + 1", "model = NULL", "duration_ms = 7, turn_id = NULL"]
)
def test_a_generation_whose_reported_values_changed_is_stale(
    world: Connection, change: LiteralString
) -> None:
    world.execute(
        "UPDATE llm_generations SET "
        + change
        + " WHERE id = (SELECT min(id::text)::uuid FROM llm_generations WHERE turn_id IS NOT NULL)"
    )
    assert _backfill(world) == NOTHING | {"enqueued": 1, "llm_generations": 1}


def test_a_reconciliation_that_changes_no_reported_value_is_not_stale(world: Connection) -> None:
    world.execute("UPDATE llm_generations SET actual_cost_usd = 1, reconciled_at = now()")
    assert _backfill(world) == NOTHING


def test_a_capability_added_to_an_agent_is_missing_in_all_its_sessions(world: Connection) -> None:
    agent = _value(world, "SELECT min(agent_id::text)::uuid FROM sessions")
    world.execute(
        "INSERT INTO agent_capabilities (agent_id, capability_id) VALUES (%s, 'new')", [agent]
    )
    sessions = _value(world, "SELECT count(*) FROM sessions WHERE agent_id = %s", agent)
    assert _backfill(world) == NOTHING | {"enqueued": sessions, "sessions": sessions}


def test_a_fact_of_a_capability_no_longer_configured_is_stale_until_it_is_removed(
    connection: Connection,
) -> None:
    _load_projected_sample(connection)
    agent = _value(
        connection,
        "SELECT min(agent_id::text)::uuid FROM agent_capabilities JOIN sessions USING (agent_id)",
    )
    connection.execute("DELETE FROM agent_capabilities WHERE agent_id = %s", [agent])
    sessions = _value(connection, "SELECT count(*) FROM sessions WHERE agent_id = %s", agent)
    assert _backfill(connection) == NOTHING | {"enqueued": sessions, "sessions": sessions}
    _drain(connection)
    assert _backfill(connection) == NOTHING
    assert differences(connection) == []


# How the limit is shared.


def test_the_limit_is_shared_fairly_and_unused_shares_pass_on(world: Connection) -> None:
    _lose(world, "fact_turn", 20)
    _lose(world, "fact_llm_generation", 5)
    _lose(world, "fact_session", 2)
    _lose(world, "fact_budget_posting", 9)
    assert _backfill(world, limit=12) == {
        "enqueued": 12,
        "events": 4,
        "llm_generations": 3,
        "sessions": 2,
        "usage_ledger": 3,
    }
    assert _backfill(world, limit=22) == {
        "enqueued": 22,
        "events": 14,
        "llm_generations": 2,
        "sessions": 0,
        "usage_ledger": 6,
    }


def test_a_single_row_is_enqueued_at_a_limit_of_one(world: Connection) -> None:
    for table in ("fact_turn", "fact_llm_generation", "fact_session", "fact_budget_posting"):
        _lose(world, table, 1)
    for left in range(4, 0, -1):
        assert _backfill(world, dry_run=True)["enqueued"] == left
        assert _backfill(world, limit=1)["enqueued"] == 1
    assert _backfill(world) == NOTHING


def test_the_oldest_sources_are_enqueued_first(world: Connection) -> None:
    _lose(world, "fact_tool_call", 10_000)
    oldest = world.execute(
        "SELECT id::text FROM events WHERE event_type = 'tool.completed' ORDER BY ts, id LIMIT 5"
    ).fetchall()
    _backfill(world, limit=5)
    assert {id_ for _, id_ in _pending(world)} == {id_ for (id_,) in oldest}


def test_a_dry_run_counts_what_would_be_enqueued_and_writes_nothing(world: Connection) -> None:
    for table in ("fact_turn", "fact_llm_generation", "fact_session", "fact_budget_posting"):
        _lose(world, table, 6)
    foretold = _backfill(world, limit=10, dry_run=True)
    assert _outbox(world) == []
    assert foretold == _backfill(world, limit=10)


def test_a_look_counts_all_that_is_missing_and_tells_since_when(world: Connection) -> None:
    assert look(world) == {source_type: Missing() for source_type in EVERY_TYPE}
    turns = _lose(world, "fact_turn", 40)
    _lose(world, "fact_llm_generation", 1)
    changed = _value(
        world,
        "UPDATE sessions SET title = 'x' WHERE id = (SELECT max(id::text)::uuid FROM sessions)"
        " RETURNING updated_at",
    )
    oldest = _value(
        world,
        "SELECT min(ts) FROM events WHERE event_type IN"
        " ('turn.completed', 'turn.failed', 'turn.cancelled')",
    )
    generation = _value(world, "SELECT min(created_at) FROM llm_generations")
    found = look(world)
    assert {source_type: (one.sources, one.oldest) for source_type, one in found.items()} == {
        "event": (len(turns), oldest),
        "llm_generation": (1, generation),
        "session": (1, changed),
        "usage_ledger": (0, None),
    }
    assert found["llm_generation"].days == [generation.date()]
    assert _outbox(world) == []
    _backfill(world, limit=1, source_types=["event"])
    assert look(world)["event"].sources == len(turns) - 1


def test_a_look_tells_damage_from_sources_that_have_only_just_changed(
    connection: Connection,
) -> None:
    world, now = World(connection), datetime.now(UTC)
    ensure_schema(connection)
    org = world.org()
    agent = world.agent(org)
    session, another = world.session(org, agent_id=agent), world.session(org)
    event = world.event(session, ts=now)
    generation = world.generation(org)
    enqueue_all(connection)
    drain_all(connection)

    def damaged() -> dict[str, int]:
        return {kind: one.damaged for kind, one in look(connection).items() if one.sources}

    assert damaged() == {}
    world.event(session, ts=now)
    connection.execute("UPDATE sessions SET title = 'x' WHERE id = %s", [another])
    connection.execute(
        "INSERT INTO agent_capabilities (agent_id, capability_id) VALUES (%s, 'new')", [agent]
    )
    connection.execute("UPDATE llm_generations SET input_tokens = input_tokens + 1")
    late = world.enqueue(org, "llm_generation", generation, f"{generation}:late_usage")
    assert damaged() == {"event": 0, "session": 0, "llm_generation": 0}

    connection.execute("UPDATE reporting_outbox SET status = 'completed' WHERE id = %s", [late])
    connection.execute("DELETE FROM fact_tool_call WHERE source_key = %s", [f"event:{event}"])
    connection.execute("DELETE FROM fact_session WHERE session_id = %s", [session])
    world.event(another, ts=NOON)
    assert damaged() == {"event": 2, "session": 1, "llm_generation": 1}


@pytest.mark.parametrize("time", TIMES_BEYOND_PYTHON)
def test_a_look_tells_of_times_that_python_has_not(connection: Connection, time: str) -> None:
    world = World(connection)
    ensure_schema(connection)
    world.event(world.session(world.org()), ts=time)
    found = look(connection)["event"]
    assert found.sources == 1
    assert found.oldest is not None


def test_a_backfill_of_one_organization_enqueues_nothing_of_others(world: Connection) -> None:
    for table in ("fact_turn", "fact_llm_generation", "fact_session", "fact_capability_usage"):
        _lose(world, table, 10_000)
    in_all = _backfill(world, limit=10_000, dry_run=True)
    of_each = [_backfill(world, limit=10_000, org_id=org_id) for org_id in (1, 2, 3)]
    assert all(of_one["enqueued"] for of_one in of_each)
    assert in_all == {key: sum(of_one[key] for of_one in of_each) for key in in_all}
    assert _value(world, "SELECT count(DISTINCT org_id) FROM reporting_outbox") == 3


@pytest.mark.parametrize("source_type", EVERY_TYPE)
def test_only_the_chosen_source_types_are_enqueued(world: Connection, source_type: str) -> None:
    assert _backfill(world, source_types=[source_type]) == NOTHING
    for table, where, _ in LOSSES:
        _lose(world, table, 2, where)
    in_all = _backfill(world, dry_run=True)
    chosen = _backfill(world, source_types=[source_type])
    count = in_all[COUNTED_AS[source_type]]
    assert chosen == NOTHING | {"enqueued": count, COUNTED_AS[source_type]: count}
    assert {kind for kind, _ in _pending(world)} == {source_type}


# What the outbox holds already.


def test_an_enqueued_row_is_due_under_its_version_and_reason(world: Connection) -> None:
    for table in ("fact_turn", "fact_llm_generation", "fact_session", "fact_budget_posting"):
        _lose(world, table, 1)
    _backfill(world)
    rows = world.execute(
        "SELECT source_type, reason, source_version = source_id, attempts,"
        " next_attempt_at <= now() FROM reporting_outbox ORDER BY 1"
    ).fetchall()
    assert rows == [
        ("event", "event_projection", True, 0, True),
        ("llm_generation", "llm_generation_projection", True, 0, True),
        ("session", "session_snapshot", False, 0, True),
        ("usage_ledger", "budget_posting_projection", True, 0, True),
    ]


@pytest.mark.parametrize("source_type", EVERY_TYPE)
def test_a_completed_row_becomes_pending_and_counts(world: Connection, source_type: str) -> None:
    table = next(table for table, _, kind in LOSSES if kind == source_type)
    [lost] = _lose(world, table, 1)
    _backfill(world)
    world.execute(
        "UPDATE reporting_outbox SET status = 'completed', next_attempt_at = '2026-01-01'"
    )
    assert _backfill(world)["enqueued"] == 1
    assert _outbox(world) == [(source_type, lost, "pending")]
    assert _value(world, "SELECT next_attempt_at = now() FROM reporting_outbox")


@pytest.mark.parametrize("status", ["pending", "processing", "failed"])
def test_rows_that_wait_already_stay_do_not_count_and_use_up_no_limit(
    world: Connection, status: str
) -> None:
    for table in ("fact_turn", "fact_llm_generation", "fact_session", "fact_budget_posting"):
        _lose(world, table, 2)
    assert _backfill(world, limit=5)["enqueued"] == 5
    world.execute("UPDATE reporting_outbox SET status = %s, next_attempt_at = 'infinity'", [status])
    assert _backfill(world, limit=2)["enqueued"] == 2
    assert _backfill(world, limit=2)["enqueued"] == 1
    assert _backfill(world, limit=2) == NOTHING
    assert Counter(row[2] for row in _outbox(world)) == Counter({status: 5}) + Counter(pending=3)


def test_repeated_calls_go_on_without_draining_until_nothing_is_left(world: Connection) -> None:
    _lose(world, "fact_turn", 7)
    results = [_backfill(world, limit=3)["enqueued"] for _ in range(4)]
    assert results == [3, 3, 1, 0]


def test_what_was_enqueued_is_right_once_it_is_drained(connection: Connection) -> None:
    _load_projected_sample(connection)
    for table, where, _ in LOSSES:
        _lose(connection, table, 5, where)
    while _backfill(connection, limit=10)["enqueued"]:
        _drain(connection)
    assert differences(connection) == []


# Versions of sessions.


def _lose_session(connection: Connection, updated_at: str = "2026-03-01T10:00:00.5Z") -> str:
    """A session without its fact, last changed at that time; its id."""
    id_ = str(_value(connection, "SELECT min(id::text)::uuid FROM sessions"))
    connection.execute("SET LOCAL session_replication_role = replica")
    connection.execute("UPDATE sessions SET updated_at = %s WHERE id = %s", [updated_at, id_])
    connection.execute("DELETE FROM fact_session WHERE source_key = 'session:' || %s", [id_])
    return id_


def _queue_session(connection: Connection, id_: str, version: str, status: str, **row: Any) -> None:
    connection.execute(
        "INSERT INTO reporting_outbox"
        " (org_id, source_type, source_id, source_version, reason, status, next_attempt_at,"
        " created_at)"
        " SELECT org_id, 'session', id, %s, 'session_snapshot', %s, %s, %s"
        " FROM sessions WHERE id = %s",
        [version, status, row.get("next", "2026-03-01"), row.get("created", "2026-03-01"), id_],
    )


def _session_versions(connection: Connection) -> dict[str, str]:
    rows = connection.execute("SELECT source_version, status FROM reporting_outbox")
    return dict(rows.fetchall())


@pytest.mark.parametrize(
    ("updated_at", "version"),
    [
        ("2026-03-01 10:00:00+00", "2026-03-01T10:00:00Z"),
        ("2026-03-01 10:00:00.120+00", "2026-03-01T10:00:00.120Z"),
        ("2026-03-01 10:00:00.120001+00", "2026-03-01T10:00:00.120001Z"),
        ("2026-03-01 10:00:00.5+05:30", "2026-03-01T04:30:00.500Z"),
    ],
)
def test_a_session_version_is_its_last_change_in_utc_with_0_3_or_6_digits(
    world: Connection, updated_at: str, version: str
) -> None:
    _lose_session(world, updated_at)
    world.execute("SET LOCAL timezone = 'Asia/Kathmandu'")
    assert _backfill(world)["sessions"] == 1
    assert _session_versions(world) == {version: "pending"}


def test_the_newest_version_of_a_session_is_reused_if_it_is_completed(world: Connection) -> None:
    id_ = _lose_session(world)
    _queue_session(world, id_, "2026-03-01T09:00:00.250Z", "completed")
    _queue_session(world, id_, "2026-03-01T09:00:00Z", "completed", created="2026-03-02")
    assert _backfill(world)["sessions"] == 1
    assert _session_versions(world) == {
        "2026-03-01T09:00:00.250Z": "pending",
        "2026-03-01T09:00:00Z": "completed",
    }


@pytest.mark.parametrize("status", ["pending", "processing", "failed"])
def test_a_session_whose_newest_version_waits_is_queued_already(
    world: Connection, status: str
) -> None:
    id_ = _lose_session(world)
    _queue_session(world, id_, "2026-03-01T09:00:00Z", status)
    assert _backfill(world) == NOTHING


def test_a_parked_session_is_queued_already_until_it_changes(world: Connection) -> None:
    id_ = _lose_session(world)
    _queue_session(world, id_, "2026-03-01T10:00:00.500Z", "failed", next="infinity")
    assert _backfill(world) == NOTHING
    world.execute("UPDATE sessions SET updated_at = '2026-03-01T11:00:00Z' WHERE id = %s", [id_])
    assert _backfill(world)["sessions"] == 1
    assert _session_versions(world) == {
        "2026-03-01T10:00:00.500Z": "failed",
        "2026-03-01T11:00:00Z": "pending",
    }


@pytest.mark.parametrize("version", ["", "of another time"])
def test_a_parked_session_whose_version_is_no_time_is_queued_already_until_it_changes(
    world: Connection, version: str
) -> None:
    id_ = _lose_session(world)
    _queue_session(world, id_, version, "failed", next="infinity")
    assert _backfill(world) == NOTHING
    world.execute("UPDATE sessions SET updated_at = '2999-03-01T11:00:00Z' WHERE id = %s", [id_])
    assert _backfill(world)["sessions"] == 1
    assert _session_versions(world) == {version: "failed", "2999-03-01T11:00:00Z": "pending"}
    assert _backfill(world) == NOTHING


# The lock, and backfills at the same time.


def test_a_global_backfill_waits_for_the_lock_in_vain_and_names_it(
    connection: Connection, postgres_url: str
) -> None:
    _load_projected_sample(connection)
    _lose(connection, "fact_turn", 3)
    with psycopg.connect(postgres_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [GLOBAL_LOCK])
        with pytest.raises(Refusal, match="0x6576657272707471") as caught:
            _backfill(connection)
        assert caught.value.as_problem_details()["code"] == "locked"
        assert _outbox(connection) == []
        assert _backfill(connection, dry_run=True)["enqueued"] == 3
        of_each = [_backfill(connection, org_id=org_id)["enqueued"] for org_id in (1, 2, 3)]
        assert sum(of_each) == 3
    assert _backfill(connection) == NOTHING


def test_a_global_backfill_keeps_others_out_while_it_writes_and_lets_go(
    connection: Connection, postgres_url: str
) -> None:
    _load_projected_sample(connection)
    take = "SELECT pg_try_advisory_xact_lock(%s)"
    with psycopg.connect(postgres_url, autocommit=True) as other:
        with connection.transaction():
            _backfill(connection)
            assert other.execute(take, [GLOBAL_LOCK]).fetchone() == (False,)
        assert other.execute(take, [GLOBAL_LOCK]).fetchone() == (True,)
    assert _value(connection, "SHOW lock_timeout") == "2min"


def test_others_may_backfill_while_one_searches_and_what_they_do_is_not_done_again(
    connection: Connection, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _load_projected_sample(connection)
    _lose(connection, "fact_turn", 2)
    assert _backfill(connection)["enqueued"] == 2
    _drain(connection)
    first, second = sorted(_lose(connection, "fact_turn", 2))
    searches: list[None] = []

    def search(*arguments: Any, **options: Any) -> None:
        find_missing(*arguments, **options)
        if not searches:
            with psycopg.connect(postgres_url, autocommit=True) as other:
                take = "SELECT pg_try_advisory_xact_lock(%s)"
                assert other.execute(take, [GLOBAL_LOCK]).fetchone() == (True,)
                other.execute(
                    "UPDATE reporting_outbox SET status = 'pending', next_attempt_at = now()"
                    " WHERE source_id = %s",
                    [first],
                )
                _drain(other)
        searches.append(None)

    monkeypatch.setattr(backfill, "find_missing", search)

    assert _backfill(connection)["enqueued"] == 1
    assert _pending(connection) == {("event", second)}
    assert len(searches) == 2
    assert _backfill(connection) == NOTHING


@pytest.mark.parametrize("org_id", [None, 1])
@pytest.mark.parametrize("limit", [150, 10_000])
def test_two_backfills_at_once_enqueue_each_missing_source_once_between_them(
    connection: Connection, postgres_url: str, org_id: int | None, limit: int
) -> None:
    _load_projected_sample(connection)
    for table, where, _ in LOSSES:
        _lose(connection, table, 10_000, where)
    missing = _backfill(connection, limit=10_000, org_id=org_id, dry_run=True)
    assert missing["enqueued"] > 150

    def backfilled(_: int) -> dict[str, int]:
        with psycopg.connect(postgres_url, autocommit=True) as own:
            return enqueue(own, BackfillRequest(limit=limit, org_id=org_id))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(backfilled, range(2)))
    expected = min(2 * limit, missing["enqueued"])
    assert sum(result["enqueued"] for result in results) == expected
    assert len(_outbox(connection)) == expected
    while _backfill(connection, org_id=org_id)["enqueued"]:
        pass
    assert len(_outbox(connection)) == missing["enqueued"]


def test_a_backfill_that_deadlocks_with_the_application_is_tried_again(
    connection: Connection, postgres_url: str
) -> None:
    """The application holds a row that the backfill wants, and wants one that it holds."""
    _load_projected_sample(connection)
    lost = _lose(connection, "fact_turn", 2)
    _backfill(connection)
    connection.execute("UPDATE reporting_outbox SET status = 'completed'")
    # In the order of their events, in which the backfill takes them.
    first, second = (
        id_
        for (id_,) in connection.execute(
            "SELECT outbox.id FROM reporting_outbox AS outbox JOIN events"
            " ON events.id::text = source_id WHERE source_id = ANY (%s) ORDER BY ts, source_id",
            [list(lost)],
        )
    )
    lock_row = "SELECT FROM reporting_outbox WHERE id = %s FOR UPDATE"

    def backfill() -> dict[str, int]:
        with psycopg.connect(postgres_url, autocommit=True) as own:
            return enqueue(own, BackfillRequest())

    with (
        psycopg.connect(postgres_url, autocommit=True) as application,
        ThreadPoolExecutor(1) as executor,
    ):
        application.execute(
            "SET deadlock_timeout = '60s'"
        )  # the backfill is the one that is chosen
        with application.transaction():
            application.execute(lock_row, [second])
            enqueuing = executor.submit(backfill)
            wait_until(lambda: waiting(connection) == 1, "the backfill to wait")
            application.execute(lock_row, [first])
        assert enqueuing.result(30)["enqueued"] == 2


def test_a_backfill_does_not_wait_for_a_projector_nor_enqueue_what_it_has_done(
    connection: Connection, postgres_url: str
) -> None:
    _load_projected_sample(connection)
    _lose(connection, "fact_turn", 3)
    _backfill(connection)
    connection.execute("UPDATE reporting_outbox SET status = 'processing', claimed_at = now()")
    with psycopg.connect(postgres_url) as projector:
        projector.execute("UPDATE reporting_outbox SET status = 'completed'")
        connection.execute("SET lock_timeout = '1s'")
        assert _backfill(connection) == NOTHING


# Digests of sessions and their events.


def test_a_dry_run_keeps_no_digests(connection: Connection) -> None:
    load_adversarial_sources(connection, seed=4, sessions=5)
    ensure_schema(connection)
    _backfill(connection, dry_run=True)
    assert _value(connection, "SELECT count(*) FROM everruns_pipelines.key_digests") == 0
    _backfill(connection)
    assert _value(connection, "SELECT count(*) FROM everruns_pipelines.key_digests") > 0


@pytest.mark.parametrize("meanwhile", ["kept", "emptied"])
def test_digests_that_somebody_replaces_meanwhile_hide_nothing(
    connection: Connection, postgres_url: str, meanwhile: str
) -> None:
    ensure_schema(connection)
    world = World(connection)
    org = world.org()
    session = world.session(org)
    missed = world.event(session)
    _backfill(connection)
    _drain(connection)
    _backfill(connection)
    added = world.event(session)
    if meanwhile == "kept":
        missed = added
    else:
        world.enqueue(org, "event", added)
        _drain(connection)
        _lose(connection, "fact_tool_call", 1, f"source_key = 'event:{missed}'")

    class Overtaken(psycopg.Connection):
        """A connection that another one overtakes once it has read the session."""

        def execute(self, query: Any, *rest: Any, **options: Any) -> Any:
            result = super().execute(query, *rest, **options)
            if 'CREATE TEMPORARY TABLE "read"' in sql.SQL("{}").format(query).as_string():
                if meanwhile == "kept":
                    _backfill(connection, source_types=["session"])
                else:
                    connection.execute("DELETE FROM everruns_pipelines.key_digests")
            return result

    with Overtaken.connect(postgres_url, autocommit=True) as own:
        _backfill(own, org_id=org, source_types=["event"])
    assert ("event", str(missed)) in _pending(connection)


def test_an_event_written_since_the_events_were_read_is_missing(world: Connection) -> None:
    _backfill(world)
    added = _add_events(world, 1)
    assert _backfill(world, source_types=["event"])["enqueued"] == len(added) == 1
    assert {id_ for _, id_ in _pending(world)} == added


def test_as_many_events_written_as_archived_since_they_were_read_are_missing(
    world: Connection,
) -> None:
    _backfill(world)
    world.execute("SET LOCAL app.archival_bypass = 'true'")
    gone = world.execute(
        "DELETE FROM events WHERE id IN (SELECT DISTINCT ON (session_id) id FROM events"
        " WHERE event_type = 'tool.completed') RETURNING id"
    ).rowcount
    world.execute(
        "DELETE FROM fact_tool_call AS fact WHERE NOT EXISTS"
        " (SELECT FROM events WHERE fact.source_key = 'event:' || events.id)"
    )
    world.execute(
        "DELETE FROM fact_capability_usage AS fact WHERE source_key LIKE '%:invoked'"
        " AND NOT EXISTS (SELECT FROM events WHERE fact.source_key LIKE 'event:' || id || '%')"
    )
    added = _add_events(world, gone)
    assert _backfill(world, source_types=["event"])["enqueued"] == len(added) == gone
    assert {id_ for _, id_ in _pending(world)} == added


_INTO_ARCHIVE = (
    "INSERT INTO archived_events SELECT gen_random_uuid(), session_id, sequence + 10000,"
    " event_type, data, ts, context, metadata, tags, created_at, now() FROM archived_events"
    " WHERE event_type = 'tool.completed' ORDER BY session_id LIMIT 1 RETURNING id::text"
)
_OUT_OF_ARCHIVE = (
    "DELETE FROM archived_events WHERE id = (SELECT id FROM archived_events"
    " WHERE event_type = 'tool.completed' ORDER BY session_id LIMIT 1)"
)


_IS_KNOWN = (
    "SELECT bit_xor(uuid_hash_extended(id, seed)) = min(ids)"
    " FROM archived_events, everruns_pipelines.archive_digest"
)


@pytest.mark.parametrize("gone", [(), (_OUT_OF_ARCHIVE,)], ids=["added", "exchanged"])
@pytest.mark.parametrize("org_first", [False, True])
def test_events_that_came_into_the_archive_otherwise_than_from_the_events_are_missing(
    world: Connection, gone: tuple[LiteralString, ...], org_first: bool
) -> None:
    _archive(world, "sequence % 3 = 0")
    _backfill(world)
    for statement in gone:
        assert world.execute(statement).rowcount == 1
    added = {id_ for (id_,) in world.execute(_INTO_ARCHIVE)}
    if org_first:
        org_id = _value(
            world,
            "SELECT org_id FROM sessions JOIN archived_events ON session_id = sessions.id"
            " WHERE archived_events.id = %s",
            *added,
        )
        assert _backfill(world, org_id=org_id, source_types=["event"], dry_run=True)["events"] == 1
        assert _backfill(world, org_id=org_id % 3 + 1, source_types=["event"]) == NOTHING
    assert _backfill(world, source_types=["event"])["events"] == len(added) == 1
    assert {id_ for kind, id_ in _pending(world) if kind == "event"} == added
    assert _value(world, _IS_KNOWN)


def test_what_is_known_of_the_archive_stays_known_as_it_grows(world: Connection) -> None:
    _archive(world, "sequence % 3 = 0")
    _backfill(world)
    known = "SELECT ids FROM everruns_pipelines.archive_digest"
    assert _value(world, _IS_KNOWN)
    before = _value(world, known)
    _archive(world, "session_id = (SELECT id FROM sessions WHERE org_id = 2 ORDER BY id LIMIT 1)")
    assert not _value(world, _IS_KNOWN)
    # One that looks at another organization does not learn of it, but this one does.
    _backfill(world, org_id=1)
    assert _value(world, known) == before
    _backfill(world, org_id=2)
    assert _value(world, _IS_KNOWN)
    # A session takes what is known of it along; its archived events stay.
    world.execute("SET LOCAL app.session_purge = 'true'")
    world.execute("DELETE FROM sessions WHERE org_id = 2")
    _backfill(world)
    assert _value(world, _IS_KNOWN)


@pytest.mark.parametrize(
    "change",
    [
        (
            "INSERT INTO agent_capabilities (agent_id, capability_id)"
            " SELECT DISTINCT agent_id, 'new' FROM sessions WHERE agent_id IS NOT NULL LIMIT 1"
        ),
        (
            "INSERT INTO harness_capabilities (harness_id, capability_id)"
            " SELECT DISTINCT harness_id, 'new' FROM sessions WHERE harness_id IS NOT NULL LIMIT 1"
        ),
        (
            "DELETE FROM agent_capabilities WHERE agent_id = (SELECT agent_id FROM sessions"
            " JOIN agent_capabilities USING (agent_id) LIMIT 1)"
        ),
        (
            'UPDATE sessions SET capabilities = capabilities || \'[{"ref": "new"}]\''
            " WHERE id = (SELECT min(id::text)::uuid FROM sessions)"
        ),
        (
            "UPDATE sessions SET agent_id = NULL WHERE id = (SELECT session.id"
            " FROM sessions AS session JOIN agent_capabilities USING (agent_id) LIMIT 1)"
        ),
        (
            "UPDATE sessions SET org_id = 3 - org_id, app_id = NULL"
            " WHERE id = (SELECT session_id FROM fact_turn WHERE org_id IN (1, 2) LIMIT 1)"
        ),
    ],
    ids=["agent", "harness", "less", "own", "other agent", "organization"],
)
def test_what_changed_of_a_session_since_it_was_read_is_missing(
    world: Connection, change: LiteralString
) -> None:
    _backfill(world)
    # What also makes the snapshot stale does not count here.
    world.execute("ALTER TABLE sessions DISABLE TRIGGER USER")
    assert world.execute(change).rowcount > 0
    with_digests = _backfill(world, dry_run=True)
    assert with_digests != NOTHING
    world.execute("DELETE FROM everruns_pipelines.key_digests")
    assert with_digests == _backfill(world, dry_run=True)


def test_the_digest_of_a_purged_session_goes_with_the_next_that_is_made(world: Connection) -> None:
    _backfill(world)
    world.execute("SET LOCAL app.session_purge = 'true'")
    world.execute("DELETE FROM sessions WHERE id = (SELECT min(id::text)::uuid FROM sessions)")
    _add_events(world, 1)
    _backfill(world)
    assert (
        _value(
            world,
            "SELECT count(*) FROM everruns_pipelines.key_digests"
            " WHERE NOT EXISTS (SELECT FROM sessions WHERE id = session_id)",
        )
        == 0
    )


def test_a_digest_of_other_projections_does_not_count(world: Connection) -> None:
    _backfill(world)
    world.execute("UPDATE everruns_pipelines.key_digests SET seed = seed + 1, keys = '{1, 2, 3}'")
    assert _backfill(world) == NOTHING
    lost = _lose(world, "fact_turn", 1)
    assert _backfill(world)["events"] == 1
    assert {id_ for _, id_ in _pending(world)} == lost


def _add_events(connection: Connection, number: int) -> set[str]:
    """A tool call at the end of each of so many sessions; their ids."""
    rows = connection.execute(
        "INSERT INTO events (session_id, sequence, event_type, ts, context, data)"
        " SELECT session_id, max(sequence) + 1, 'tool.completed', max(ts), '{}', '{}'"
        " FROM events GROUP BY session_id ORDER BY session_id LIMIT %s RETURNING id::text",
        [number],
    )
    return {id_ for (id_,) in rows}


# Odd sources.


@pytest.mark.parametrize(("seed", "looked_up"), [(1, 20_000), (2, 20_000), (2, 3)])
def test_missing_is_what_a_recomputation_misses(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, seed: int, looked_up: int
) -> None:
    monkeypatch.setattr("everruns_pipelines.reporting.slices._MOST_SESSIONS", looked_up)
    load_adversarial_sources(connection, seed=seed, sessions=15, events_per_session=20)
    ensure_schema(connection)
    assert _enqueued_all(connection) == {
        (kind, id_)
        for table in expected_facts(connection).values()
        for kind, id_ in (key.split(":")[:2] for _, key in table)
    }
    _drain(connection)
    assert _backfill(connection) == NOTHING
    assert differences(connection) == []

    dice = Random(seed)
    for table, rows in actual_facts(connection).items():
        for org_id, key in rows:
            if dice.random() < 0.05:
                _damage(connection, dice, table, org_id, key)
    expected, actual = expected_facts(connection), actual_facts(connection)
    lost = {key for table in expected for key in expected[table].keys() - actual[table].keys()}
    assert _enqueued_all(connection) == {(key.split(":")[0], key.split(":")[1]) for _, key in lost}


def _damage(connection: Connection, dice: Random, table: str, org_id: int, key: str) -> None:
    """Delete the fact, move it to another organization, or give it a companion of no source."""
    change: LiteralString = dice.choice(
        (
            "DELETE FROM {} AS fact",
            "UPDATE {} AS fact SET org_id = (SELECT min(org_id) FROM other_orgs)",
            "UPDATE {} AS fact SET source_key = source_key || ':gone'",
        )
    )
    connection.execute(
        sql.SQL(
            "WITH other_orgs AS (SELECT org_id FROM organizations WHERE org_id <> %s)"
            + change
            + " WHERE org_id = %s AND source_key = %s"
        ).format(sql.Identifier(table)),
        [org_id, org_id, key],
    )


def _enqueued_all(connection: Connection) -> set[tuple[str, str]]:
    while _backfill(connection, limit=700)["enqueued"]:
        pass
    return _pending(connection)


def test_rows_that_always_fail_are_enqueued_once_and_hide_nothing(connection: Connection) -> None:
    failing = set(load_unstorable_sources(connection, 1))
    ensure_schema(connection)
    for _ in range(3):
        while _backfill(connection, limit=5)["enqueued"]:
            pass
        _drain(connection)
    failed = {(kind, id_) for kind, id_, status in _outbox(connection) if status == "failed"}
    assert failed == failing
    assert differences(connection) == []


def test_keys_declared_in_the_catalog_are_those_that_the_projections_make(
    connection: Connection,
) -> None:
    load_adversarial_sources(connection, seed=3, sessions=15)
    ensure_schema(connection)
    for fact in FACTS:
        for projection in fact.projections:
            if projection.key:
                _assert_key_is_true(connection, fact, projection)


def _assert_key_is_true(connection: Connection, fact: Fact, projection: Projection) -> None:
    assert projection.source is EVENT
    declared = connection.execute(
        sql.SQL("SELECT {} FROM ({}) AS source WHERE {} ORDER BY 1").format(
            sql.SQL(projection.key or ""),
            selected_rows(EVENT, projection.event_types, EVERYTHING),
            sql.SQL(projection.only),
        )
    )
    made = connection.execute(
        sql.SQL(
            "SELECT source_key FROM ({}) AS projected WHERE rejected IS NULL ORDER BY 1"
        ).format(projected_rows(fact, projection, EVERYTHING))
    )
    assert declared.fetchall() == made.fetchall() != []
