"""A live webserver and daemon: the command line over GraphQL, the sensor, the documented calls."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.client import Deployment, Progress
from everruns_pipelines.commands import main
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.serve.tokens import Grant, make_token
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import (
    LiveDeployment,
    live_deployment,
    run_commands,
    until,
)
from everruns_pipelines_tests.items.world import PROJECT, SESSION, Span, World, envelope

pytestmark = pytest.mark.deploy

COUNTS = ["enqueued", "events", "llm_generations", "sessions", "usage_ledger"]


@pytest.fixture(scope="module")
def live_settings(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A database of sample data, half of it enqueued, and a few spans."""
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE live TEMPLATE everruns STRATEGY FILE_COPY")
        settings = Settings.from_environment(
            {
                "EVERRUNS_POSTGRES_URL": embedded_postgres_url(home, "live"),
                "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{tmp_path_factory.mktemp('spans')}/data",
                "EVERRUNS_HOME": str(home),
            }
        )
        with PostgresDatabase(settings).connect() as connection:
            load_sample_data(connection, events=1500, days=3, enqueued_share=0.5)
            _report_an_item(settings, connection)
        yield settings
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier("live")))


def _report_an_item(settings: Settings, connection: Connection) -> None:
    from everruns_pipelines.databases.embedded.clickhouse import span_tables

    world = World(PostgresDatabase(settings), ClickHouseDatabase(settings), connection)
    with world.clickhouse.connect() as opened_engine:
        for statement in span_tables():
            opened_engine.client.command(statement)
    world.add_project("webapp", PROJECT)
    world.add(Span([envelope("one")]))


@pytest.fixture(scope="module")
def live(
    live_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveDeployment]:
    assert live_settings.postgres_url is not None
    assert live_settings.clickhouse_dsn is not None
    environment = {
        "EVERRUNS_POSTGRES_URL": live_settings.postgres_url.get_secret_value(),
        "EVERRUNS_CLICKHOUSE_DSN": live_settings.clickhouse_dsn.get_secret_value(),
        "EVERRUNS_HOME": str(live_settings.home),
    }
    home = tmp_path_factory.mktemp("dagster")
    (home / "tokens").touch()
    environment["EVERRUNS_API_TOKENS"] = str(home / "tokens")
    with live_deployment(home, environment) as deployment:
        yield deployment


def test_the_sensor_drains_what_is_due(live: LiveDeployment, live_settings: Settings) -> None:
    with PostgresDatabase(live_settings).connect() as connection:

        def is_drained() -> bool:
            query = "SELECT count(*) FROM reporting_outbox WHERE status <> 'completed'"
            return connection.execute(query).fetchone() == (0,)

        until(is_drained, "the outbox is drained")


def test_backfill_over_http_prints_its_counts(
    live: LiveDeployment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["backfill", "--limit", "40", "--url", live.url]) == 0
    printed = capsys.readouterr()
    assert list(json.loads(printed.out)) == COUNTS
    assert json.loads(printed.out)["enqueued"] == 40
    # Who projects what is enqueued may be a run of the outbox sensor.
    assert "40 are enqueued" in printed.err
    assert f"{live.url}/runs/" in printed.err


def test_a_run_that_refuses_is_told_like_the_api_does(
    live: LiveDeployment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["project", "--org-id", "77", "--url", live.url]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["code"], told["status"]) == ("not_found_error", 404)


def test_rebuild_over_http_prints_what_it_processed(
    live: LiveDeployment, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = ["--organization", "acme", "--workspace", "red", "--project", "webapp"]
    assert main.run(["rebuild", *scope, "--session-id", SESSION, "--url", live.url]) == 0
    assert json.loads(capsys.readouterr().out) == {"processed": 1}


def test_waiting_survives_a_restart_of_the_webserver(live: LiveDeployment) -> None:
    deployment = Deployment(live.url)
    run = deployment.launch("backfill_reporting", {"enqueue": {"limit": 10}})
    live.stop("webserver")
    told: list[str] = []

    def start_again(said: Progress) -> None:
        if not told:
            live.start_webserver()
        told.append(said.message)

    assert deployment.follow(run, start_again)["enqueue"]["enqueued"] == 10
    assert told[0] == f"Waiting: {live.url} does not answer (ConnectionError)"


def test_the_documented_commands_work(live: LiveDeployment, tmp_path: Path) -> None:
    live.wait_for_webserver()
    told = run_commands("graphql.md", live, tmp_path)
    assert "SUCCESS" in told
    assert '"label":"enqueued","intValue":5}' in told


def test_the_platforms_own_call_is_answered_by_a_run(live: LiveDeployment) -> None:
    live.wait_for_webserver()
    token, line = make_token(Grant("caller", frozenset({"reports:admin"})))
    Path(live.environment["EVERRUNS_API_TOKENS"]).write_text(line)
    command = f"""curl --silent --request POST \\
        --url {live.url}/api/v1/reports/admin/backfill \\
        --header 'Authorization: Bearer {token}' \\
        --header 'Content-Type: application/json' \\
        --data '{{ "limit": 7 }}'"""
    told = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=True)
    counts = json.loads(told.stdout)
    assert list(counts) == COUNTS
    assert counts["enqueued"] == 7
