"""Dagster's storage asks the database once which columns it has, and gives no request a connection
that has died.
"""

from collections.abc import Iterator

import psycopg
import pytest
from dagster import DagsterInstance, DagsterRun
from sqlalchemy import event
from sqlalchemy.engine import Engine

from everruns_pipelines.dagster_storage import EverrunsDagsterStorage
from everruns_pipelines_tests.deployment import ROOT


@pytest.fixture
def stored(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    """An instance with the repository's own dagster.yaml."""
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", postgres_url)
    with DagsterInstance.from_config(str(ROOT)) as instance:
        yield instance


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """What is asked of Dagster's storage."""
    asked: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield asked
    event.remove(Engine, "before_cursor_execute", note)


def test_only_the_first_look_reads_the_system_catalog(
    stored: DagsterInstance, statements: list[str]
) -> None:
    assert isinstance(stored.get_ref().storage, EverrunsDagsterStorage)
    run = stored.add_run(DagsterRun("project_reporting"))

    def look() -> None:
        assert stored.get_run_by_id(run.run_id) is not None
        assert stored.all_instigator_state() == []

    look()
    assert [one for one in statements if "pg_catalog" in one]
    statements.clear()
    look()
    assert [one for one in statements if "pg_catalog" in one] == []
    assert any("FROM runs" in one for one in statements)


def test_a_web_server_goes_on_when_the_connections_that_it_kept_have_died(
    stored: DagsterInstance, postgres_url: str
) -> None:
    stored.optimize_for_webserver(statement_timeout=15_000, pool_recycle=3600, max_overflow=20)

    def look() -> None:
        assert stored.get_runs() == []
        assert stored.all_asset_keys() == []
        assert stored.all_instigator_state() == []

    look()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        ended = admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchall()
    assert len(ended) >= 3
    look()
