"""Each half of the project on its own, on a database that has nothing of the other half.

Of the half that is off every database is named by a URL at which nobody answers: whoever asks it
fails.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, cast

import dagster as dg
import psycopg
import pytest
from dagster import DagsterInstance
from psycopg import sql

from everruns_pipelines.commands import main
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, ItemsPostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.items.world import PROJECT, SESSION, Span, World, envelope
from everruns_pipelines_tests.reporting import world as reporting

SCHEMA = files("everruns_pipelines.databases.embedded") / "schema"
TABLES = {"reporting": ("platform.sql", "reporting.sql", "triggers.sql"), "items": ("items.sql",)}
# What is younger may be under way.
AN_HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)
AWAY = "postgresql://nobody@127.0.0.1:1/nowhere"
REBUILD = ("--organization", "acme", "--workspace", "red", "--project", "webapp")
OF_THE_OTHER = {
    "reporting": (("rebuild", *REBUILD, "--session-id", SESSION),),
    "items": (("backfill",), ("project",), ("unpark",), ("erase", "--session-id", SESSION)),
}


@pytest.fixture(params=["reporting", "items"])
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(admin: Connection, home: Any, part: str) -> Iterator[str]:
    """The URL of a database with the tables of one half."""
    name = f"only_{part}"
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = embedded_postgres_url(home, name)
    with psycopg.connect(url) as connection:
        for script in TABLES[part]:
            connection.execute((SCHEMA / script).read_bytes())
    yield url
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def environment(
    part: str, database: str, home: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> Mapping[str, str]:
    """What the user of that half sets."""
    named = {
        "reporting": {
            "EVERRUNS_POSTGRES_URL": database,
            "EVERRUNS_ITEMS_POSTGRES_URL": AWAY,
            "EVERRUNS_CLICKHOUSE_DSN": "clickhouse://127.0.0.1:1/nothing",
        },
        "items": {
            "EVERRUNS_POSTGRES_URL": AWAY,
            "EVERRUNS_ITEMS_POSTGRES_URL": database,
            "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{tmp_path}/spans",
        },
    }
    environment = {"EVERRUNS_PARTS": part, "EVERRUNS_HOME": str(home), **named[part]}
    environment["EVERRUNS_ALERT_URLS"] = "json://127.0.0.1:1"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DAGSTER_HOME", "")
    return environment


@pytest.fixture
def settings(environment: Mapping[str, str]) -> Settings:
    settings = Settings.from_environment(environment)
    return settings.model_copy(update={"reporting_start": AN_HOUR_AGO.date()})


@pytest.fixture
def lost(part: str, settings: Settings, database: str) -> Iterator[None]:
    """Something to repair: an event without its fact, or an envelope without its item."""
    with psycopg.connect(database, autocommit=True) as connection:
        if part == "reporting":
            world = reporting.World(connection)
            world.event(world.session(world.org()), ts=datetime.now(UTC))
        else:
            spans = ClickHouseDatabase(settings)
            with spans.connect() as opened:
                for statement in span_tables():
                    opened.client.command(statement)
            world = World(ItemsPostgresDatabase(settings), spans, connection)
            world.add_project("webapp", PROJECT)
            world.add(Span([envelope("one")], start=AN_HOUR_AGO))
        yield


def test_every_command_works_or_is_refused_in_one_line(
    part: str, lost: None, database: str, capfd: pytest.CaptureFixture[str]
) -> None:
    del lost

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        return main.run(arguments), capfd.readouterr().out

    assert run("init", "--indexes")[0] == 0
    status, told = run("doctor")
    assert (status, "FIX" in told) == (0, False), told
    assert run("diagnose")[0] == 1
    status, told = run("diagnose", "--json")
    diagnosis = json.loads(told)
    assert (status, diagnosis["parts"]) == (1, [part])
    assert sum(day["missing"] for day in diagnosis["days"]) > 0
    if part == "reporting":
        assert json.loads(run("backfill")[1])["events"] == 1
        assert json.loads(run("project")[1])["claimed"] == 0
        assert run("unpark")[0] == 0
        assert run("erase", "--session-id", SESSION, "--dry-run")[0] == 0
    else:
        told = run("rebuild", *REBUILD, "--session-id", SESSION, "--dry-run")[1]
        would = json.loads(told)
        assert (would["inserted"], would["unchanged"], would["out_of_scope"]) == (1, 0, 0)
        told = run("rebuild", *REBUILD, "--session-id", SESSION)[1]
        assert json.loads(told) == {"processed": 1}
        with psycopg.connect(database, autocommit=True) as connection:
            edited = connection.execute(
                "UPDATE items SET title = 'mine', data = '{}' RETURNING id::text"
            ).fetchone()
        assert edited is not None
        told = run("rebuild", *REBUILD, "--session-id", SESSION, "--dry-run")[1]
        assert json.loads(told)["taken_back"] == [{"item": edited[0], "fields": "title, data"}]
        assert run("rebuild", *REBUILD, "--session-id", SESSION)[0] == 0
    status, told = run("diagnose", "--json")
    assert status == 0
    assert sum(day["missing"] for day in json.loads(told)["days"]) == 0
    assert run("check", "--days", "1")[0] == 0
    for arguments in OF_THE_OTHER[part]:
        capfd.readouterr()
        assert main.run(arguments) == 2
        errors = capfd.readouterr().err
        assert errors.count("\n") == 1
        assert "EVERRUNS_PARTS" in errors


def test_only_what_is_of_the_part_is_defined(part: str, settings: Settings) -> None:
    repository = build_definitions(settings).get_repository_def()
    other = {"reporting": "item", "items": "report"}[part]
    names = [
        *(key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()),
        *(check.name for check in repository.asset_graph.asset_check_keys),
        *(job.name for job in repository.get_all_jobs()),
        *(sensor.name for sensor in repository.sensor_defs),
        *(schedule.name for schedule in repository.schedule_defs),
    ]
    assert not [name for name in names if other in name]
    assert {"pipeline_health", "housekeeping", "daily_housekeeping"} <= set(names)


def test_every_sensor_schedule_and_job_runs(
    settings: Settings, lost: None, instance: DagsterInstance
) -> None:
    del lost
    definitions = build_definitions(settings)
    repository = definitions.get_repository_def()
    for sensor in repository.sensor_defs:
        with dg.build_sensor_context(
            instance=instance,
            repository_def=repository,
            resources=_plain(definitions),
        ) as context:
            assert sensor.evaluate_tick(context)
    today = datetime.now(UTC)
    for schedule in repository.schedule_defs:
        with dg.build_schedule_context(
            instance=instance, scheduled_execution_time=today, repository_def=repository
        ) as context:
            for request in schedule.evaluate_tick(context).run_requests or []:
                done = definitions.resolve_job_def(schedule.job_name).execute_in_process(
                    request.run_config, instance=instance, tags=dict(request.tags)
                )
                assert done.success


def _plain(definitions: dg.Definitions) -> dict[str, Any]:
    """What each resource hands out."""
    return {
        key: cast("Any", resource).create_resource(dg.build_init_resource_context())
        for key, resource in (definitions.resources or {}).items()
        if isinstance(resource, dg.ConfigurableResource)
    }


def test_a_database_without_any_table_of_a_part_is_told_with_the_variable_to_set(
    part: str,
    database: str,
    environment: Mapping[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both halves are on, and there is one of them."""
    monkeypatch.delenv("EVERRUNS_PARTS")
    monkeypatch.delenv("EVERRUNS_ITEMS_POSTGRES_URL")
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", database)
    del environment
    assert main.run(["doctor"]) == 1
    told = capfd.readouterr().out
    assert f"or EVERRUNS_PARTS={part} leaves" in told
