"""Erasure: nothing that was derived from a session that is gone stays, and all else does."""

import json
from uuid import UUID

import pytest
from psycopg import sql

from everruns_pipelines.commands.main import run
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.erasure import erase
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    World,
    archive,
    drain_all,
    enqueue_all,
    materialize,
    purge_sessions,
    rows,
    value,
    versions,
)

OF_A_SESSION = {
    "fact_llm_generation": 1,
    "fact_tool_call": 2,
    "fact_turn": 1,
    "fact_session": 1,
    "fact_budget_posting": 0,
    "fact_capability_usage": 2,
    "everruns_pipelines.fact_rejections": 2,
    "everruns_pipelines.key_digests": 1,
    "reporting_outbox": 6,
}


def busy_session(world: World, org: int) -> tuple[UUID, list[UUID]]:
    """A session with facts of every kind, two of its events rejected; its events."""
    session = world.session(org, capabilities='["plain"]')
    events = [
        world.event(session, data={"capability_id": "plain"}),
        world.event(session, data={"capability_id": None}),
        world.event(session, "turn.completed"),
        world.event(session, "output.message.replaced", data={"guardrail_capability_id": None}),
    ]
    world.generation(org, session)
    world.posting(org, session)
    return session, events


@pytest.fixture
def purged(world: World) -> tuple[UUID, UUID]:
    """A session whose events were archived, most of them, before it was purged; one that stands."""
    org = world.org()
    (session, events), (other, other_events) = (busy_session(world, org) for _ in range(2))
    enqueue_all(world.connection)
    drain_all(world.connection)
    assert enqueue(world.connection, BackfillRequest())["enqueued"] == 0
    archive(world.connection, *events[:3], other_events[0])
    purge_sessions(world.connection, session)
    return session, other


def naming(connection: Connection, session: UUID) -> dict[str, int]:
    """How many rows of each table name the session."""
    tables = [fact.table for fact in FACTS]
    tables += ["everruns_pipelines.fact_rejections", "everruns_pipelines.key_digests"]
    return {
        table: connection.execute(
            sql.SQL("SELECT FROM {} WHERE session_id = %s").format(
                sql.Identifier(*table.split("."))
            ),
            [session],
        ).rowcount
        for table in tables
    }


def test_nothing_of_a_purged_session_stays_and_nothing_else_goes(
    world: World, purged: tuple[UUID, UUID]
) -> None:
    session, other = purged
    connection = world.connection
    others = naming(connection, other)
    before = versions(connection)

    assert erase(connection, str(session), dry_run=True) == OF_A_SESSION
    assert versions(connection) == before
    assert erase(connection, str(session)) == OF_A_SESSION

    assert set(naming(connection, session).values()) == {0}
    assert naming(connection, other) == others
    # The ledger outlives the session; what is kept of it names the session no more.
    assert value(connection, "SELECT count(*) FROM fact_budget_posting") == 2
    left = "SELECT count(*) FROM reporting_outbox WHERE source_type = 'session'"
    assert value(connection, left) == 1
    assert erase(connection, str(session)) == dict.fromkeys(OF_A_SESSION, 0)
    enqueue(connection, BackfillRequest())
    drain_all(connection)
    assert differences(connection) == []


def test_of_a_session_that_stands_only_what_lost_its_source_goes(
    world: World, purged: tuple[UUID, UUID]
) -> None:
    connection = world.connection
    connection.execute("DELETE FROM llm_generations")

    erased = erase(connection, str(purged[1]))

    assert {table: n for table, n in erased.items() if n} == {
        "fact_llm_generation": 1,
        "reporting_outbox": 1,
    }


def test_a_rejection_noted_without_its_session_goes_with_its_source(
    world: World, purged: tuple[UUID, UUID]
) -> None:
    """Earlier versions did not note the session."""
    connection = world.connection
    connection.execute("UPDATE everruns_pipelines.fact_rejections SET session_id = NULL")

    assert erase(connection, str(purged[0]))["everruns_pipelines.fact_rejections"] == 2

    assert value(connection, "SELECT count(*) FROM everruns_pipelines.fact_rejections") == 2


def test_what_is_removed_on_request_for_a_day_leaves_nothing_in_our_own_tables(
    world: World, purged: tuple[UUID, UUID]
) -> None:
    session, other = purged
    connection = world.connection

    materialize(connection, remove_orphans=True, session_id=str(session))

    assert set(naming(connection, session).values()) == {0}
    assert naming(connection, other)["everruns_pipelines.key_digests"] == 1
    assert naming(connection, other)["everruns_pipelines.fact_rejections"] == 2


def test_a_backfill_forgets_what_our_own_tables_keep_of_sessions_that_are_gone(
    world: World, purged: tuple[UUID, UUID]
) -> None:
    enqueue(world.connection, BackfillRequest())

    kept = naming(world.connection, purged[0])
    assert kept["everruns_pipelines.key_digests"] == 0
    assert kept["everruns_pipelines.fact_rejections"] == 0
    assert kept["fact_tool_call"] == 2


def test_the_command_counts_and_erases(
    world: World,
    purged: tuple[UUID, UUID],
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", postgres_url)
    command = ["erase", "--session-id", str(purged[0])]
    for arguments in ([*command, "--dry-run"], command):
        assert run(arguments) == 0
        assert json.loads(capsys.readouterr().out) == OF_A_SESSION
    assert rows(world.connection, "SELECT FROM fact_turn WHERE session_id = %s", purged[0]) == []


@pytest.mark.parametrize("session_id", ["", "all", "019ac2d0-0000-7000-8000-000000000000' OR true"])
def test_what_is_no_session_is_refused(ready: Connection, session_id: str) -> None:
    with pytest.raises(Refusal, match="session_id: expected the UUID of a session"):
        erase(ready, session_id)
