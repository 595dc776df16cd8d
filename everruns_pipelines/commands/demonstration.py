"""The main job before the reader's eyes: facts are lost, found missing, and repaired."""

import json
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from everruns_pipelines.commands.local_runs import run_job
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.sample_items import (
    LOST_SESSION,
    ORGANIZATION,
    PROJECT,
    TRIAGED_SESSION,
    WORKSPACE,
    load_sample_items,
)
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.home import dagster_home
from everruns_pipelines.orchestration.partitions import day_range_tags
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.database import create_indexes, prepare
from everruns_pipelines.reporting.reconcile import compare_days
from everruns_pipelines.settings import Settings

_EVENTS = 20_000
_LIMIT = 10_000


def demonstrate(settings: Settings) -> None:
    """Run the main job end to end on the embedded databases.

    Raises:
        Refusal: a database is configured; the demo writes made-up data and has no place there.
    """
    configured = (settings.postgres_url, settings.items_postgres_url, settings.clickhouse_dsn)
    if any(configured):
        raise Refusal(
            "the demo writes made-up data into the embedded databases only: "
            "unset EVERRUNS_POSTGRES_URL, EVERRUNS_ITEMS_POSTGRES_URL and EVERRUNS_CLICKHOUSE_DSN"
        )
    console = Console(stderr=True)
    with PostgresDatabase(settings).connect() as connection:
        # Where `dev` looks for runs, so that it shows those of the demo.
        os.environ["DAGSTER_HOME"] = str(dagster_home(settings))
        if "reporting" in settings.parts:
            settings = _reporting(settings, connection, console)
        if "items" in settings.parts:
            _items(settings, connection, console)
    console.print()
    with _step(console, "The job measure_health: all is right again"):
        _run(settings, "measure_health")
    console.print(f"\nnext: {_next(settings)}", soft_wrap=True)


def _next(settings: Settings) -> str:
    """What to type to see in the UI what the demo did."""
    start = f"EVERRUNS_REPORTING_START={settings.reporting_start}"
    return f"`{start} make dev`, then open http://127.0.0.1:3000/asset-groups"


def _reporting(settings: Settings, connection: Connection, console: Console) -> Settings:
    """The settings to go on with: their first partition is the day of the first event."""
    with _step(console, f"PostgreSQL 18 under {settings.home}, with the platform's tables"):
        prepare(connection)
        create_indexes(connection)
        first, last = _sample_data(connection)
    settings = settings.model_copy(update={"reporting_start": first})
    with _step(console, "The job project_reporting: projecting what the application enqueued"):
        _run(settings, "project_reporting", {"project": {}})
    week_ago = last - timedelta(days=7)
    with _step(console, f"The platform's retention: events before {week_ago} move to the archive"):
        _archive(connection, week_ago)
    with _step(console, "Losing facts by hand: all of yesterday's turns, a third of tool calls"):
        _lose_facts(connection, last - timedelta(days=1))
    with _step(console, "The job measure_health: its checks fail"):
        _run(settings, "measure_health")
    _show(console, connection, first, last, "After the loss")
    with _step(console, f"The job backfill_reporting: finding and projecting up to {_LIMIT}"):
        outputs = _backfill(settings)
    _show(console, connection, first, last, "After the backfill")
    with _step(console, "The same job again: there is nothing left to enqueue"):
        again = _backfill(settings)
    console.print(f"  {json.dumps(again['enqueue'])}", soft_wrap=True)
    console.print("\nThe result of the backfill, as the API answers it:")
    _answer(console, outputs["enqueue"])
    with _step(console, "The job materialize_reporting: every day compared with its sources"):
        _materialize(settings, "materialize_reporting", first)
    return settings


def _backfill(settings: Settings) -> dict[str, dict[str, Any]]:
    config = {"enqueue": {"limit": _LIMIT}, "project": {}}
    return _run(settings, "backfill_reporting", config)


def _items(settings: Settings, connection: Connection, console: Console) -> None:
    console.print()
    with (
        _step(console, "chDB with two agent sessions; the POSTs of most of their items failed"),
        ClickHouseDatabase(settings).connect() as clickhouse,
    ):
        load_sample_items(connection, clickhouse)
    _show_items(console, connection, "Items before")
    for session in (LOST_SESSION, TRIAGED_SESSION):
        with _step(console, f"The job rebuild_items: session {session}"):
            counts = _rebuild(settings, session)
        console.print(f"  {json.dumps(counts)}", soft_wrap=True)
    _show_items(console, connection, "Items after: triage untouched, titles as reported")
    with _step(console, "The same job again: there is nothing left to change"):
        again = _rebuild(settings, TRIAGED_SESSION)
    console.print(f"  {json.dumps(again)}", soft_wrap=True)
    console.print("\nThe result of that rebuild, as the API answers it:")
    _answer(console, {"processed": again["processed"]})
    with _step(console, "The job materialize_items: a day of spans, for all projects"):
        _materialize(settings, "materialize_items", datetime.now(UTC).date() - timedelta(days=1))


def _materialize(settings: Settings, job: str, first: date) -> None:
    """All days from `first` to today, in one run."""
    today = datetime.now(UTC).date()
    _run(settings, job, tags=day_range_tags(settings, today, (today - first).days + 1))


def _run(
    settings: Settings,
    job: str,
    ops: Mapping[str, Mapping[str, Any]] | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    return run_job(settings, job, ops or {}, log_level="CRITICAL", origin="demo", tags=tags)


def _answer(console: Console, counts: dict[str, int]) -> None:
    """To standard output, in its place among what standard error says."""
    console.file.flush()
    sys.stdout.write(json.dumps(counts) + "\n")
    sys.stdout.flush()


def _rebuild(settings: Settings, session: str) -> dict[str, int]:
    config = {
        "organization": ORGANIZATION,
        "workspace": WORKSPACE,
        "project": PROJECT,
        "session_id": session,
    }
    return _run(settings, "rebuild_items", {"rebuild": config})["rebuild"]


def _show_items(console: Console, connection: Connection, title: str) -> None:
    table = Table("session", "source", "items", "triaged", "untitled", title=title)
    rows = connection.execute(
        "SELECT left(session_id::text, 8), source, count(*), count(disposition),"
        " count(*) FILTER (WHERE title = 'untitled') FROM items"
        " WHERE session_id = ANY (%s::uuid[]) GROUP BY 1, 2 ORDER BY 1, 2",
        [[LOST_SESSION, TRIAGED_SESSION]],
    )
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


@contextmanager
def _step(console: Console, text: str) -> Generator[None]:
    with console.status(text):
        yield
    console.print(f"[green]✓[/green] {text}")


def _sample_data(connection: Connection) -> tuple[date, date]:
    """Load the sample data into an empty database; the first and last day of its events."""
    if connection.execute("SELECT FROM events LIMIT 1").fetchone() is None:
        load_sample_data(connection, events=_EVENTS)
    row = connection.execute(
        "SELECT min(ts)::date, max(ts)::date"
        " FROM (SELECT ts FROM events UNION ALL SELECT ts FROM archived_events) AS event"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def _archive(connection: Connection, before: date) -> None:
    with connection.transaction():
        connection.execute("SET LOCAL app.archival_bypass = 'true'")
        connection.execute(
            "WITH old AS (DELETE FROM events WHERE created_at < %s RETURNING *)"
            " INSERT INTO archived_events SELECT old.*, now() FROM old",
            [before],
        )


def _lose_facts(connection: Connection, day: date) -> None:
    connection.execute("DELETE FROM fact_turn WHERE time_bucket_day = %s", [day])
    connection.execute("DELETE FROM fact_tool_call WHERE hashtext(source_key) % 3 = 0")


def _show(console: Console, connection: Connection, first: date, last: date, title: str) -> None:
    table = Table("fact", "expected rows", "missing", "stale", "orphaned", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    with console.status("Comparing every fact with its source, day by day"):
        for fact in FACTS:
            states = compare_days(connection, fact, first, last).values()
            missing = sum(state.missing for state in states)
            table.add_row(
                fact.table,
                str(sum(state.expected for state in states)),
                f"[red]{missing}[/red]" if missing else "0",
                str(sum(state.stale + state.superseded for state in states)),
                str(sum(state.orphaned for state in states)),
            )
    console.print(table)
