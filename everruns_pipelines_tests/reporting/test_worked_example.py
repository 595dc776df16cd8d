"""The session of docs/backfill.md, followed through the tables of a backfill."""

from typing import Any
from uuid import uuid4

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import SOURCES
from everruns_pipelines.reporting.missing import find_missing
from everruns_pipelines_tests.reporting.world import World, drain_all, rows, value

NOTHING = {"enqueued": 0, "events": 0, "llm_generations": 0, "sessions": 0, "usage_ledger": 0}
STEPS = ("slices", "read", "explanations", "found_0", "found_1", "missing")


def looked(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    """The tables of a search; those that it did not need are left out."""
    with transaction(connection, one_snapshot=True):
        find_missing(connection, SOURCES, None, keep_digests=False)
        made = (
            "SELECT table_name FROM information_schema.tables WHERE table_type = 'LOCAL TEMPORARY'"
        )
        names = {name for (name,) in rows(connection, made)}
        return {
            name: connection.execute(
                sql.SQL("TABLE pg_temp.{}").format(sql.Identifier(name))
            ).fetchall()
            for name in STEPS
            if name in names
        }


def test_one_session_step_by_step(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    call = {"success": True, "tool_name": "search"}
    world.event(session, data=call)
    b = world.event(session, data=call)
    world.event(session, "turn.completed", data={"turn_id": str(uuid4())})
    assert enqueue(connection, BackfillRequest())["enqueued"] == 4
    drain_all(connection)
    assert enqueue(connection, BackfillRequest()) == NOTHING
    connection.execute("DELETE FROM fact_tool_call WHERE source_key = %s", [f"event:{b}"])

    found = looked(connection)

    assert "read" not in found
    [(of, digest_holds, _archived, *settled)] = found["slices"]
    assert (of, digest_holds, settled) == (session, True, [0, 0, 0])
    assert [row[0] for row in found["explanations"]] == [b]
    assert [row[3] for row in found["found_0"]] == [str(b)]
    assert "found_1" not in found
    assert [row[3] for row in found["missing"]] == [str(b)]

    assert enqueue(connection, BackfillRequest()) == NOTHING | {"enqueued": 1, "events": 1}
    assert enqueue(connection, BackfillRequest()) == NOTHING
    drain_all(connection)
    assert value(connection, "SELECT count(*) FROM fact_tool_call") == 2
    assert looked(connection)["slices"] == []


def test_two_lost_facts_of_a_session_have_no_explanation(world: World) -> None:
    connection = world.connection
    session = world.session(world.org())
    for _ in range(3):
        world.event(session)
    enqueue(connection, BackfillRequest())
    drain_all(connection)
    connection.execute(
        "DELETE FROM fact_tool_call WHERE source_key IN"
        " (SELECT source_key FROM fact_tool_call ORDER BY source_key LIMIT 2)"
    )

    found = looked(connection)

    assert (found["explanations"], len(found["missing"])) == ([], 2)
    assert found["slices"][0][3:] == (0, 0, 0)
