"""The embedded platform schema: the contract's, catalog against catalog, and its triggers."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines_tests.reporting.world import NOON, World, archive, rows, value

CONTRACT: dict[str, Any] = json.loads(Path(__file__).with_name("everruns_schema.json").read_text())

_COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull, pg_get_expr(adbin, adrelid)
FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
ORDER BY attnum
"""
_CONSTRAINTS = """
SELECT pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = to_regclass(%s) AND contype <> 'n' ORDER BY 1
"""
_INDEXES = """
SELECT split_part(pg_get_indexdef(indexrelid), ' USING ', 2)
    || CASE WHEN indisunique THEN ' [unique]' ELSE '' END
FROM pg_index WHERE indrelid = to_regclass(%s) ORDER BY 1
"""


def _described(connection: Connection, table: str) -> dict[str, Any]:
    columns: list[tuple[str, dict[str, Any]]] = []
    for name, type_, null, default in rows(connection, _COLUMNS, table):
        column = {"type": type_, "null": null}
        columns.append((name, column if default is None else column | {"default": default}))
    return {
        "columns": columns,
        "constraints": [text for (text,) in rows(connection, _CONSTRAINTS, table)],
        "indexes": [text for (text,) in rows(connection, _INDEXES, table)],
    }


def test_every_table_equals_the_contract_to_the_column_constraint_and_index(
    connection: Connection,
) -> None:
    for table, wanted in CONTRACT.items():
        assert _described(connection, table) == {
            "columns": list(wanted["columns"].items()),
            "constraints": sorted(wanted["constraints"]),
            "indexes": sorted(wanted["indexes"]),
        }, table


@pytest.fixture
def world(connection: Connection) -> World:
    return World(connection)


@pytest.mark.parametrize("table", ["sessions", "agents", "harnesses", "reporting_outbox"])
def test_every_update_says_when_it_was(world: World, table: LiteralString) -> None:
    connection = world.connection
    org = world.org()
    world.session(org)
    world.agent(org)
    world.enqueue(org, "event", "id")
    connection.execute(
        "INSERT INTO harnesses (org_id, name, display_name, system_prompt)"
        " VALUES (%s, 'h', 'h', '')",
        [org],
    )
    with connection.transaction():
        connection.execute(f"UPDATE {table} SET updated_at = %s", [NOON])
        assert value(connection, f"SELECT bool_and(updated_at = now()) FROM {table}")


@pytest.mark.parametrize("change", ["UPDATE events SET data = '{}'", "DELETE FROM events"])
def test_events_are_append_only(world: World, change: LiteralString) -> None:
    world.event(world.session(world.org()))

    with pytest.raises(psycopg.Error, match="append-only"):
        world.connection.execute(change)

    assert value(world.connection, "SELECT count(*) FROM events") == 1


@pytest.mark.parametrize("reason", ["app.archival_bypass", "app.session_purge"])
def test_events_may_be_deleted_but_not_changed_where_the_transaction_says_why(
    world: World, reason: str
) -> None:
    connection = world.connection
    world.event(world.session(world.org()))
    allow: LiteralString = "SELECT set_config(%s, 'true', true)"

    with connection.transaction():
        connection.execute(allow, [reason])
        with pytest.raises(psycopg.Error, match="append-only"), connection.transaction():
            connection.execute("UPDATE events SET data = '{}'")
        connection.execute("DELETE FROM events")

    assert value(connection, "SELECT count(*) FROM events") == 0


def test_the_permission_to_delete_ends_with_its_transaction(world: World) -> None:
    world.event(world.session(world.org()))
    with world.connection.transaction():
        world.connection.execute("SET LOCAL app.session_purge = 'true'")

    with pytest.raises(psycopg.Error, match="append-only"):
        world.connection.execute("DELETE FROM events")


def test_a_session_counts_a_turn_and_its_tool_calls_when_the_turn_ends(world: World) -> None:
    session, other = (world.session(world.org()) for _ in range(2))
    world.event(session, "turn.started")
    for event_type in ("turn.completed", "tool.completed", "tool.completed"):
        world.event(session, event_type)
    assert _counted(world, session) == (1, 0, "completed", NOON)
    world.event(session, "turn.cancelled")
    world.event(session, "turn.failed", ts=NOON.replace(hour=13))
    world.event(session, "tool.started")
    world.event(session, "tool.completed")

    assert _counted(world, session) == (3, 2, "failed", NOON.replace(hour=13))
    assert _counted(world, other) == (0, 0, None, None)


def test_a_session_forgets_what_retention_takes_away(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    events = [
        world.event(session, event_type)
        for event_type in ("tool.completed", "turn.completed", "tool.completed", "turn.failed")
    ]

    archive(connection, events[3], events[0])
    assert _counted(world, session) == (1, 1, "completed", NOON)
    assert value(connection, "SELECT updated_at > %s FROM sessions", NOON)
    archive(connection, *events[1:3])
    assert _counted(world, session) == (0, 0, None, None)
    assert value(connection, "SELECT count(*) FROM archived_events") == 4


def _counted(world: World, session: UUID) -> tuple[int, int, str | None, datetime | None]:
    [counted] = rows(
        world.connection,
        "SELECT turn_count, tool_call_count, last_turn_status, last_turn_at"
        " FROM sessions WHERE id = %s",
        session,
    )
    turns, tools, status, at = counted
    return turns, tools, status, at
