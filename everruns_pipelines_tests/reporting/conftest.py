"""A database that is ready for reporting."""

import pytest

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting import database
from everruns_pipelines_tests.reporting.world import World


@pytest.fixture
def ready(connection: Connection) -> Connection:
    """A connection to a fresh database in which our own schema is made."""
    database.prepare(connection)
    return connection


@pytest.fixture
def world(ready: Connection) -> World:
    """Makes source rows in that database."""
    return World(ready)
