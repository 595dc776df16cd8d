"""Fixtures of the items half: a project in PostgreSQL, an empty span table in chDB."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.items.world import PROJECT, World

_USUAL = "otel_traces.sql"


@pytest.fixture(scope="session")
def items_database(home: Path) -> str:
    """One database for all tests of items: emptying a few tables is cheaper than a new one."""
    name = "test_items"
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE everruns").format(sql.Identifier(name)))
    return embedded_postgres_url(home, name)


@pytest.fixture
def postgres_url(items_database: str) -> str:
    """The database, as it was before any test, its settings too."""
    with psycopg.connect(items_database, autocommit=True) as connection:
        database = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(database))
        connection.execute("TRUNCATE item_organizations CASCADE")
        connection.execute("DROP SCHEMA IF EXISTS everruns_pipelines CASCADE")
    return items_database


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A chDB directory per generation of the span table."""

    @cache
    def made(generation: str) -> Path:
        directory = tmp_path_factory.mktemp("chdb") / "data"
        directory.mkdir()
        settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": f"chdb://{directory}"})
        with ClickHouseDatabase(settings).connect() as clickhouse:
            for statement in span_tables(generation):
                clickhouse.client.command(statement)
        return directory

    return made


@pytest.fixture
def generation() -> str:
    return _USUAL


@pytest.fixture
def engine(engines: Callable[[str], Path], generation: str) -> Path:
    """A chDB directory with the span table; `World` empties it before its first span."""
    return engines(generation)


@pytest.fixture
def settings(postgres_url: str, home: Path, engine: Path) -> Settings:
    return Settings.from_environment(
        {
            "EVERRUNS_POSTGRES_URL": postgres_url,
            "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{engine}",
            "EVERRUNS_HOME": str(home),
            "EVERRUNS_REPORTING_START": "2026-01-01",
        }
    )


@pytest.fixture
def world(settings: Settings, connection: Connection) -> World:
    """The project acme/red/webapp, without spans and without items."""
    world = World(PostgresDatabase(settings), ClickHouseDatabase(settings), connection)
    world.add_project("webapp", PROJECT)
    return world
