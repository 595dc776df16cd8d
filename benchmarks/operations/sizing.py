"""What to buy: rows that one projector projects in a second, and what a fact weighs."""

import time
from collections.abc import Generator

from psycopg import sql

from benchmarks.operations._platform import sample
from benchmarks.operations._table import Row, show
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.drain import drain

EVENTS = 60_000
MOST = 10_000


def main() -> None:
    """Measure, and print."""
    show("Sizing", rates())


def rates() -> Generator[Row]:
    with (
        sample(EVENTS) as (settings, _),
        PostgresDatabase(settings).connect() as connection,
    ):
        sources, seconds = 0, 0.0
        while enqueued := enqueue(connection, BackfillRequest(limit=MOST))["enqueued"]:
            started = time.perf_counter()
            for _ in drain(connection, max_attempts=12):
                pass
            seconds += time.perf_counter() - started
            sources += enqueued
        facts, weight = _weighed(connection)
        day = time.perf_counter()
        assert enqueue(connection, BackfillRequest(dry_run=True))["enqueued"] == 0
        looked = time.perf_counter() - day
    what = "sources projected by one projector, on one processor of PostgreSQL"
    yield what, f"{sources / seconds:,.0f} a second", "reported"
    yield "a fact with its indexes, mean of all", f"{weight / facts:,.0f} bytes", "reported"
    yield f"that nothing is missing among {EVENTS:,} events", f"{looked:.1f} s", "reported"


def _weighed(connection: Connection) -> tuple[int, int]:
    """How many facts there are, and their bytes."""
    facts = weight = 0
    for fact in FACTS:
        row = connection.execute(
            sql.SQL("SELECT count(*), pg_total_relation_size({}) FROM {}").format(
                sql.Literal(fact.table), sql.Identifier(fact.table)
            )
        ).fetchone()
        assert row is not None
        facts += row[0]
        weight += row[1]
    return facts, weight
