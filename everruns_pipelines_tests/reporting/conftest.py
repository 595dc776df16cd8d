"""A database that is ready for reporting."""

from pathlib import Path

import psycopg
import pytest

from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting import database
from everruns_pipelines_tests.conftest import copy_database
from everruns_pipelines_tests.reporting.world import World


@pytest.fixture(scope="session")
def prepared(home: Path, admin: Connection) -> str:
    """A database in which our own schema is made."""
    copy_database(admin, "prepared")
    with psycopg.connect(embedded_postgres_url(home, "prepared"), autocommit=True) as connection:
        database.prepare(connection)
    return "prepared"


@pytest.fixture
def template(request: pytest.FixtureRequest, template: str) -> str:
    is_ready = "ready" in request.fixturenames
    return str(request.getfixturevalue("prepared")) if is_ready else template


@pytest.fixture
def ready(connection: Connection) -> Connection:
    """A connection to a fresh database in which our own schema is made."""
    return connection


@pytest.fixture
def world(ready: Connection) -> World:
    """Makes source rows in that database."""
    return World(ready)
