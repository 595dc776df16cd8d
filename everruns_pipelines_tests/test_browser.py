"""A person at the UI, in a real browser: what the page says, and what the rows say."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from playwright.sync_api import Page, expect

from everruns_pipelines.client import Deployment
from everruns_pipelines.dagster_storage import storage_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.backfill import GLOBAL_LOCK
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.browser import (
    CHROMIUM,
    execute_checks,
    launch_backfill,
    look_around,
    materialize,
    materialized,
    opened,
    sample_deployment,
    terminate,
)
from everruns_pipelines_tests.deployment import LiveDeployment, until
from everruns_pipelines_tests.reporting.world import rows, value

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(
        not CHROMIUM.exists(), reason="there is no Chromium: apt-get install chromium"
    ),
]

Platform = tuple[LiveDeployment, Connection]
TODAY = datetime.now(UTC).date()
TURNS = "SELECT time_bucket_day, count(*)::int FROM fact_turn GROUP BY 1"


def storage(live: LiveDeployment, query: LiteralString, *parameters: Any) -> list[tuple[Any, ...]]:
    """Rows of Dagster's own storage."""
    with psycopg.connect(storage_url(Settings.from_environment(live.environment))) as connection:
        return connection.execute(query, parameters).fetchall()


def ago(days: int) -> date:
    return TODAY - timedelta(days=days)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with sample_deployment(tmp_path_factory.mktemp("ui"), events=1500, days=4) as started:
        yield started


@pytest.fixture(scope="module")
def live(platform: Platform) -> LiveDeployment:
    return platform[0]


@pytest.fixture(scope="module")
def connection(platform: Platform) -> Connection:
    return platform[1]


@pytest.fixture
def page(live: LiveDeployment) -> Iterator[Page]:
    with opened(live.url) as page:
        yield page


def test_execute_all_finds_the_days_of_a_fact_that_are_wrong(
    page: Page, connection: Connection
) -> None:
    lost = connection.execute("DELETE FROM fact_turn WHERE time_bucket_day = %s", [ago(1)]).rowcount
    before = rows(connection, TURNS)
    assert execute_checks(page, "fact_turn") == {
        "no_missing_rows": "Failed",
        "no_orphaned_rows": "Succeeded",
        "no_stale_rows": "Succeeded",
    }
    told = f"{lost} missing rows on {ago(1)}. Materialize these days to repair them."
    expect(page.get_by_text(told)).to_be_visible()
    assert sorted(rows(connection, TURNS)) == sorted(before)


def test_execute_all_finds_items_that_are_missing(page: Page, connection: Connection) -> None:
    before = value(connection, "SELECT count(*) FROM items")
    results = execute_checks(page, "items")
    assert results == {"no_missing_rows": "Failed", "no_stale_rows": "Failed"}
    expect(page.get_by_text("missing rows on")).to_be_visible()
    assert value(connection, "SELECT count(*) FROM items") == before


def test_a_day_is_materialized(page: Page, connection: Connection) -> None:
    connection.execute("DELETE FROM fact_tool_call")
    materialize(page, "fact_tool_call", ago(1), ago(1))
    days = "SELECT DISTINCT time_bucket_day FROM fact_tool_call"
    until(lambda: rows(connection, days) != [], "the facts are back")
    inserted = materialized(page, "fact_tool_call", ago(1))
    assert rows(connection, days) == [(ago(1),)]
    assert value(connection, "SELECT count(*) FROM fact_tool_call") == inserted


def test_a_range_of_days_is_materialized_by_one_run(
    page: Page, live: LiveDeployment, connection: Connection
) -> None:
    connection.execute("DELETE FROM fact_turn")
    materialize(page, "fact_turn", ago(3), ago(1))
    until(lambda: len(rows(connection, TURNS)) == 3, "the facts are back")
    inserted = {ago(days): materialized(page, "fact_turn", ago(days)) for days in (3, 2, 1)}
    assert dict(rows(connection, TURNS)) == inserted
    ranges = "SELECT count(*) FROM run_tags WHERE key = 'dagster/asset_partition_range_start'"
    assert storage(live, ranges) == [(1,)]


def test_a_run_that_waits_for_a_lock_is_terminated(
    page: Page, live: LiveDeployment, connection: Connection
) -> None:
    connection.execute("DELETE FROM fact_turn")
    connection.execute("DELETE FROM reporting_outbox")
    connection.execute("SELECT pg_advisory_lock(%s)", [GLOBAL_LOCK])
    deployment = Deployment(live.url)
    run = deployment.launch("backfill_reporting", {})
    terminate(page, run, "Looking for sources whose facts are missing or stale")
    assert storage(live, "SELECT status FROM runs WHERE run_id = %s", run) == [("CANCELED",)]
    locks = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database IS NOT NULL"
    assert rows(connection, locks) == [(connection.info.backend_pid,)]
    connection.execute("SELECT pg_advisory_unlock_all()")
    assert value(connection, "SELECT count(*) FROM reporting_outbox") == 0
    assert deployment.run("backfill_reporting", {})["enqueue"]["enqueued"] > 0


def test_a_backfill_is_launched_and_the_ui_works_under_its_guard(
    page: Page, live: LiveDeployment, connection: Connection, tmp_path: Path
) -> None:
    problems: list[str] = []
    page.on("console", lambda one: problems.append(one.text))
    connection.execute("DELETE FROM fact_turn")
    assert launch_backfill(page, 20) == 20
    Deployment(live.url).run("measure_health", {})
    look_around(page, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert [one for one in problems if "Content Security Policy" in one] == []
