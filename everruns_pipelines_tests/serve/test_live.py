"""The API with a daemon and runs of its own: what takes runs that end, fail, wait or are killed."""

import os
import re
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import requests
from psycopg import sql

from everruns_pipelines.client import Deployment
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.backfill import GLOBAL_LOCK
from everruns_pipelines.serve.tokens import Grant, make_token
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import (
    LiveDeployment,
    live_deployment,
    run_commands,
    until,
)
from everruns_pipelines_tests.items.world import PROJECT, Span, World, envelope
from everruns_pipelines_tests.serve.conftest import BACKFILL
from everruns_pipelines_tests.serve.test_refusals import refused

pytestmark = pytest.mark.deploy

TOKEN, LINE = make_token(Grant("caller", frozenset({"reports:admin", "items:admin"})))


@pytest.fixture(scope="module")
def environment(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    directory = tmp_path_factory.mktemp("api")
    (directory / "tokens").write_text(LINE + "\n")
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        for name, template in (("api", "everruns"), ("api_dagster", "template0")):
            admin.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                    sql.Identifier(name), sql.Identifier(template)
                )
            )
        yield {
            "EVERRUNS_POSTGRES_URL": embedded_postgres_url(home, "api"),
            "EVERRUNS_DAGSTER_POSTGRES_URL": embedded_postgres_url(home, "api_dagster"),
            "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{directory}/spans",
            "EVERRUNS_HOME": str(home),
            "EVERRUNS_API_TOKENS": str(directory / "tokens"),
        }
        for name in ("api", "api_dagster"):
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def connection(environment: dict[str, str]) -> Iterator[Connection]:
    settings = Settings.from_environment(environment)
    postgres, clickhouse = PostgresDatabase(settings), ClickHouseDatabase(settings)
    with postgres.connect() as connection:
        load_sample_data(connection, events=300, days=3, enqueued_share=0.0)
        with clickhouse.connect() as engine:
            for statement in span_tables():
                engine.client.command(statement)
        world = World(postgres, clickhouse, connection)
        world.add_project("webapp", PROJECT)
        world.add(Span([envelope("one")]))
        yield connection


@pytest.fixture(scope="module")
def live(
    environment: dict[str, str],
    connection: Connection,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveDeployment]:
    with live_deployment(tmp_path_factory.mktemp("dagster"), environment) as deployment:
        yield deployment


def ask(live: LiveDeployment, **headers: str) -> requests.Response:
    given = {"Authorization": f"Bearer {TOKEN}", **headers}
    return requests.post(live.url + BACKFILL, headers=given, timeout=300)


@pytest.fixture
def lock(connection: Connection) -> Iterator[None]:
    """The lock of the platform's own backfills, held by somebody else."""
    connection.execute("SELECT pg_advisory_lock(%s)", [GLOBAL_LOCK])
    yield
    connection.execute("SELECT pg_advisory_unlock_all()")


@pytest.mark.usefixtures("lock")
def test_the_lock_of_another_backfill_is_a_conflict(live: LiveDeployment) -> None:
    response = ask(live)
    refused(response, 409)
    told = response.json()
    assert (told["code"], told["allowed_actions"]) == ("locked", ["retry"])
    assert told["instance"].startswith(f"{live.url}/runs/")
    assert told["retry_after_seconds"] == int(response.headers["Retry-After"])


def test_a_database_that_fails_under_a_run_is_told(
    live: LiveDeployment, connection: Connection
) -> None:
    connection.execute(
        "CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE EXCEPTION 'no more' USING DETAIL = 'payload'; END$$"
    )
    connection.execute(
        "CREATE TRIGGER fails BEFORE INSERT ON reporting_outbox EXECUTE FUNCTION fails()"
    )
    try:
        response = ask(live)
    finally:
        connection.execute("DROP FUNCTION fails CASCADE")
    assert refused(response, 502) == "PostgreSQL failed: no more"
    assert response.json()["instance"].startswith(f"{live.url}/runs/")


def kill_at_work(environment: Mapping[str, str], connection: Connection) -> None:
    """Kill the backfill once it waits for the lock, then give the lock back."""
    with psycopg.connect(environment["EVERRUNS_DAGSTER_POSTGRES_URL"], autocommit=True) as told:

        def worker() -> int | None:
            row = told.execute(
                "SELECT string_agg(event, '') FROM event_logs"
                " WHERE run_id = (SELECT run_id FROM runs WHERE status = 'STARTED'"
                " AND pipeline_name = 'backfill_reporting')"
                " HAVING bool_or(dagster_event_type = 'STEP_START')"
            ).fetchone()
            match = row and re.search(r"\(pid: (\d+)\)", row[0])
            return int(match[1]) if match else None

        until(lambda: worker() is not None, "the run is at work")
        pid = worker()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    connection.execute("SELECT pg_advisory_unlock_all()")


@pytest.mark.usefixtures("lock")
def test_a_run_that_is_killed_is_done_again_and_answers(
    live: LiveDeployment, connection: Connection, environment: dict[str, str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, live)
        kill_at_work(environment, connection)
        response = asked.result()
    assert response.status_code == 200, response.text
    assert response.json()["enqueued"] > 0


@pytest.mark.usefixtures("lock")
def test_our_client_waits_for_a_killed_run_that_is_done_again(
    live: LiveDeployment, connection: Connection, environment: dict[str, str]
) -> None:
    connection.execute("DELETE FROM fact_turn")
    told: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        deployment = Deployment(live.url)
        asked = pool.submit(
            deployment.run, "backfill_reporting", {}, lambda said: told.append(said.message)
        )
        kill_at_work(environment, connection)
        counts = asked.result()
    assert counts["enqueue"]["enqueued"] > 0
    assert any("done again" in message for message in told)


def test_a_server_that_restarts_loses_no_run(live: LiveDeployment) -> None:
    live.stop("daemon")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, live, **{"Idempotency-Key": "restart"})
        until(lambda: queued(live) == 1, "the run is queued")
        live.stop("webserver")
        refused(waiting.result(), 504)
    live.start_webserver()
    live.start_daemon()
    live.wait_for_webserver()
    response = ask(live, **{"Idempotency-Key": "restart"})
    assert response.status_code == 200, response.text
    with psycopg.connect(live.environment["EVERRUNS_DAGSTER_POSTGRES_URL"]) as storage:
        keyed = storage.execute("SELECT count(*) FROM run_tags WHERE value = 'restart'").fetchone()
    assert keyed == (1,)


def queued(live: LiveDeployment) -> int:
    with psycopg.connect(live.environment["EVERRUNS_DAGSTER_POSTGRES_URL"]) as storage:
        row = storage.execute("SELECT count(*) FROM runs WHERE status = 'QUEUED'").fetchone()
    assert row is not None
    return int(row[0])


def test_the_documented_commands_work(live: LiveDeployment, tmp_path: Path) -> None:
    told = run_commands("api.md", live, tmp_path)
    assert '{"enqueued": ' in told
    assert '{"processed": 0}{"processed": 0}' in told
