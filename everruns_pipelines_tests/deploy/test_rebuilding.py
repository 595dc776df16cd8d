"""What docs/operating.md says need not be backed up: lost, and made again by its commands."""

import json

import pytest
from psycopg import sql

from everruns_pipelines.commands import main
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import value

pytestmark = pytest.mark.deploy


@pytest.fixture
def right(connection: Connection, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Connection:
    """A platform whose facts are right."""
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("EVERRUNS_PARTS", "reporting")
    load_adversarial_sources(connection, seed=9, sessions=6)
    return connection


def backfilled(capsys: pytest.CaptureFixture[str]) -> int:
    """Run `everruns-pipelines backfill` until it enqueues nothing; how much it did."""
    total = 0
    while True:
        capsys.readouterr()
        assert main.run(["backfill", "--limit", "10000"]) == 0
        enqueued = json.loads(capsys.readouterr().out)["enqueued"]
        if not enqueued:
            return total
        total += enqueued


def test_facts_that_are_lost_are_made_by_backfills(
    right: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    assert backfilled(capsys) > 0
    assert differences(right) == []
    facts = {fact.table: count(right, fact.table) for fact in FACTS}
    assert all(facts.values())
    for table in facts:
        right.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(table)))
    right.execute("TRUNCATE reporting_outbox")

    assert backfilled(capsys) > 0

    assert {table: count(right, table) for table in facts} == facts
    assert differences(right) == []


def count(connection: Connection, table: str) -> int:
    query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def test_our_schema_that_is_lost_is_made_by_init(
    right: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    backfilled(capsys)
    right.execute("DROP SCHEMA everruns_pipelines CASCADE")

    assert main.run(["init"]) == 0

    database.OWN.check(right)
    assert backfilled(capsys) == 0
    assert value(right, "SELECT count(*) > 0 FROM everruns_pipelines.key_digests")
    assert differences(right) == []
