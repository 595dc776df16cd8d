"""Projectors that die: nothing is lost, nothing is done twice, and no healthy row is blamed."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.deaths import Deaths
from everruns_pipelines.reporting.drain import Drained, drain_in_parallel
from everruns_pipelines.reporting.outbox import unpark
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    World,
    drain_all,
    enqueue_all,
    outbox,
    value,
    wait_until,
)

_PARKED = "every projector that worked on this row alone died"


def drained(postgres: PostgresDatabase) -> Drained:
    total = Drained()
    for batch in drain_in_parallel(postgres):
        total.add(batch)
    return total


def suspects(connection: Connection) -> int:
    return int(value(connection, "SELECT count(*) FROM everruns_pipelines.outbox_suspects"))


def registered(connection: Connection) -> int:
    return int(value(connection, "SELECT count(*) FROM everruns_pipelines.outbox_projectors"))


def deadly(world: World, action: LiteralString, *, tool: str = "deadly") -> None:
    """What writes a call of this tool does something terrible."""
    world.connection.execute(
        sql.SQL(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.tool_name = {} THEN PERFORM {}; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER die BEFORE INSERT ON fact_tool_call"
            " FOR EACH ROW EXECUTE FUNCTION die()"
        ).format(sql.Literal(tool), sql.SQL(action))
    )


def test_a_row_that_kills_is_found_and_parked_and_all_others_are_completed(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    session = world.session(org)
    harmless = [world.enqueue(org, "event", world.event(session)) for _ in range(11)]
    deadly(world, "pg_terminate_backend(pg_backend_pid()), pg_sleep(10)")
    event = world.event(session, data={"tool_name": "deadly"})
    killer = world.enqueue(org, "event", event)
    connection = world.connection

    total = drained(postgres)

    assert total.result() == {"claimed": 12, "completed": 11, "failed": 1, "parked": 1}
    assert [outbox(connection, id_, "status", "attempts") for id_ in harmless] == [
        ("completed", 1)
    ] * len(harmless)
    assert outbox(connection, killer, "status", "attempts", "last_error") == ("failed", 0, _PARKED)
    assert value(connection, "SELECT count(*) FROM fact_tool_call") == 11

    # It remains a suspect: unparked, it is tried alone, and parked for one more death.
    unpark(connection, None, None, dry_run=False)
    assert drained(postgres).result()["parked"] == 1
    connection.execute("DROP TRIGGER die ON fact_tool_call")
    unpark(connection, None, None, dry_run=False)
    assert drained(postgres).result()["completed"] == 1
    assert (suspects(connection), registered(connection)) == (0, 0)


def test_batches_that_take_longer_than_a_transaction_may_become_smaller_and_none_is_parked(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    session = world.session(org)
    for _ in range(100):
        world.enqueue(org, "event", world.event(session, data={"tool_name": "slow"}))
    deadly(world, "pg_sleep(0.004)", tool="slow")
    database = sql.Identifier(world.connection.info.dbname)
    world.connection.execute(
        sql.SQL("ALTER DATABASE {} SET transaction_timeout = '200ms'").format(database)
    )

    total = drained(postgres)

    assert total.result() == {"claimed": 100, "completed": 100, "failed": 0, "parked": 0}
    assert (suspects(world.connection), registered(world.connection)) == (0, 0)


def test_rows_of_projectors_that_were_killed_are_tried_again_and_blamed_for_nothing(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    session = world.session(org)
    ids = [world.enqueue(org, "event", world.event(session)) for _ in range(5)]
    connection = world.connection
    for _ in range(13):
        with (
            suppress(psycopg.OperationalError),
            postgres.connect() as dying,
            Deaths.watched(dying),
        ):
            terminate(connection, dying.info.backend_pid)
            dying.execute("SELECT")
    assert registered(connection) == 13

    assert drain_all(connection).completed == len(ids)

    assert {outbox(connection, id_, "status", "attempts") for id_ in ids} == {("completed", 1)}
    assert (suspects(connection), registered(connection)) == (0, 0)


def terminate(connection: Connection, pid: int) -> None:
    """End a server process, and wait until it has gone."""
    connection.execute("SELECT pg_terminate_backend(%s)", [pid])
    here = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: value(connection, here, pid) == 0, "the process to be gone")


def dying_before(connection: Connection, word: int, die: Callable[[], object]) -> Callable[[], int]:
    """Let `die` be called before the n-th word with the server; how many have been said."""
    wait = connection.wait
    said = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal said
        said += 1
        if said == word:
            die()
        return wait(*args, **options)

    vars(connection)["wait"] = counted
    return lambda: said


def killed_before(postgres: PostgresDatabase, word: int) -> bool:
    """A process of its own drains, and kills itself; was it killed before it was done?"""
    child = os.fork()
    if child == 0:
        with postgres.connect() as connection:
            dying_before(connection, word, lambda: os.kill(os.getpid(), signal.SIGKILL))
            drain_all(connection)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def terminated_before(postgres: PostgresDatabase, word: int) -> bool:
    """The server ends the connection; had it been done?"""
    with postgres.connect() as admin, postgres.connect() as connection:
        die = partial(terminate, admin, connection.info.backend_pid)
        said = dying_before(connection, word, die)
        with suppress(psycopg.OperationalError):
            drain_all(connection)
        return 0 < word <= said()


@pytest.mark.parametrize("dies", [killed_before, terminated_before])
def test_wherever_in_a_batch_its_projector_dies_facts_and_queue_agree(
    world: World, postgres: PostgresDatabase, dies: Callable[[PostgresDatabase, int], bool]
) -> None:
    org = world.org()
    session = world.session(org, capabilities='["configured"]')
    world.event(session, data={"capability_id": "c"})
    world.event(session, "turn.completed")
    world.generation(org, session)
    world.posting(org, session)
    enqueued = enqueue_all(world.connection)
    connection = world.connection
    everything = (enqueued, 7)

    word = 0
    done = dies(postgres, 0) or state(connection)
    assert done == everything
    is_dead = True
    while is_dead:
        word += 1
        for fact in FACTS:
            connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(fact.table)))
        connection.execute("DELETE FROM reporting_outbox")
        enqueue_all(connection)
        is_dead = dies(postgres, word)
        wait_until(lambda: alone(connection), "the server to notice")
        assert state(connection) in ((0, 0), everything)
        drain_all(connection)
        assert state(connection) == everything, word
    assert word > 30
    assert differences(connection) == []
    assert (suspects(connection), registered(connection)) == (0, 0)


def state(connection: Connection) -> tuple[int, int]:
    """How many rows of the outbox are completed, once, and how many facts there are."""
    completed = value(
        connection,
        "SELECT count(*) FROM reporting_outbox WHERE status = 'completed' AND attempts = 1",
    )
    facts = 0
    for fact in FACTS:
        counted = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(fact.table))
        facts += sum(count for (count,) in connection.execute(counted))
    return int(completed), facts


def alone(connection: Connection) -> bool:
    """Nobody else is connected."""
    return bool(
        value(
            connection,
            "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()",
        )
    )
