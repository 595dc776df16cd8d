"""Dagster's storage asks the database once which columns it has, not at each look."""

from collections.abc import Iterator

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
