"""A primary and its replica: which of them is used, and what a failover does."""

from pathlib import Path

import pytest

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deploy.services import HOST, PostgresServer
from everruns_pipelines_tests.deployment import until

pytestmark = pytest.mark.deploy


def port_of(url: str) -> int:
    database = PostgresDatabase(Settings.from_environment({"EVERRUNS_POSTGRES_URL": url}))
    with database.connect() as connection:
        return connection.info.port


def test_the_primary_is_used_whichever_it_is(place: Path) -> None:
    first, second = PostgresServer(place / "first"), PostgresServer(place / "second")
    hosts = f"{HOST}:{second.port},{HOST}:{first.port}"
    both = f"postgresql://postgres@{hosts}/postgres"
    first.initialize()
    with first.started():
        second.copy_of(first)
        with second.started():
            assert port_of(both) == first.port
            with pytest.raises(Refusal) as refused:
                port_of(second.url())
            assert refused.value.code == "unavailable"
            assert "must name a running primary" in refused.value.detail
    with second.started():
        with pytest.raises(Refusal):
            port_of(both)
        second.promote()
        until(lambda: is_primary(second), "it is promoted")
        assert port_of(both) == second.port


def is_primary(server: PostgresServer) -> bool:
    try:
        return port_of(server.url()) == server.port
    except Refusal:
        return False
