"""One embedded PostgreSQL for a whole test process; a database of its own for every test.

Nothing outside of temporary directories is touched: neither the databases nor the Dagster instance
that the variables of whoever runs the tests name, nor their home.
"""

import atexit
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from dagster import DagsterInstance
from psycopg import sql

from everruns_pipelines.databases.embedded.servers import embedded_postgres_url, stop_server
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.settings import Settings

# What tells the tests themselves something.
_KEPT = ("EVERRUNS_TEST_WORLDS", "EVERRUNS_WRITE_SNAPSHOT")
for _name in tuple(os.environ):
    if _name.startswith(("EVERRUNS_", "DAGSTER_")) and _name not in _KEPT:
        del os.environ[_name]
_nowhere = TemporaryDirectory(prefix="everruns-tests-")
atexit.register(_nowhere.cleanup)
# Commands that are run without settings of their own find their places here.
os.environ |= {
    "HOME": _nowhere.name,
    "DAGSTER_HOME": "",
    "EVERRUNS_HOME": f"{_nowhere.name}/everruns",
}

# A shell that starts the tests in the background has them ignore it, and whatever they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of long tests, the longest first: begun early, they keep nobody waiting at the end.
_FIRST = (
    *("test_celery.py", "test_one_machine.py", "test_healing.py", "test_kubernetes.py"),
    *("test_live.py", "test_deployment.py", "test_servers.py", "test_parts.py"),
)

_ENOUGH_MEMORY = 4 * 2**30  # bytes
_numbers = itertools.count(1)
_left: list[str] = []

_migrations: dict[str | None, ScriptDirectory] = {}
_read_migrations = ScriptDirectory.from_config


def _read_migrations_once(config: Config) -> ScriptDirectory:
    """Dagster's: it looks up the newest one for every instance, which takes a tenth of a second."""
    place = config.get_main_option("script_location")
    if place not in _migrations:
        _migrations[place] = _read_migrations(config)
    return _migrations[place]


pytest.MonkeyPatch().setattr(ScriptDirectory, "from_config", _read_migrations_once)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """EVERRUNS_HOME of the embedded servers that the tests use.

    In memory where there is room: a fresh database is a thousand files.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < _ENOUGH_MEMORY:
        yield tmp_path_factory.mktemp("everruns")
        return
    with TemporaryDirectory(prefix="everruns-", dir=memory) as directory:
        yield Path(directory)
        stop_server(Path(directory))


@pytest.fixture(scope="session")
def admin(home: Path) -> Iterator[Connection]:
    """A superuser's connection to the server, which does no more than it must."""
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as connection:
        for setting in ("fsync", "full_page_writes", "synchronous_commit", "autovacuum", "jit"):
            connection.execute(sql.SQL("ALTER SYSTEM SET {} = off").format(sql.Identifier(setting)))
        connection.execute("SELECT pg_reload_conf()")
        yield connection


def copy_database(admin: Connection, name: str, template: str = "everruns") -> None:
    """Make a database like another, which nobody may be connected to."""
    admin.execute(
        sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
            sql.Identifier(name), sql.Identifier(template)
        )
    )


@pytest.fixture
def template() -> str:
    """The database that a test's own is a copy of."""
    return "everruns"


@pytest.fixture
def postgres_url(home: Path, admin: Connection, template: str) -> Iterator[str]:
    """A fresh database with the platform's schema."""
    name = f"test_{next(_numbers)}"
    copy_database(admin, name, template)
    # Those of tests before, whose connections have gone by now: for one that is just closing, the
    # server would wait a tenth of a second.
    while _left:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(_left.pop())))
    yield embedded_postgres_url(home, name)
    _left.append(name)


@pytest.fixture
def settings(postgres_url: str, home: Path) -> Settings:
    return Settings.from_environment(
        {"EVERRUNS_POSTGRES_URL": postgres_url, "EVERRUNS_HOME": str(home)}
    )


@pytest.fixture
def postgres(settings: Settings) -> PostgresDatabase:
    return PostgresDatabase(settings)


@pytest.fixture
def connection(postgres: PostgresDatabase) -> Iterator[Connection]:
    with postgres.connect() as connection:
        yield connection


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    """Dagster's runs and events, in memory."""
    with DagsterInstance.ephemeral() as instance:  # pyright: ignore[reportUnknownMemberType]
        yield instance
