"""What a backfill costs at a million events, against the naive form, and as more is missing; with
as many archived beside them; of one organization; and what it costs to compare days that are right,
or to materialize them. How all that grows with the data: `benchmarks/growth.py`.

The naive form looks every expected key up, table after table, at the server's default settings. All
is measured in turn, several times, and the best of each counts: the machine has other things to do.
"""

import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import LiteralString

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from benchmarks.projection import database, insert_bare
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SOURCES, Fact
from everruns_pipelines.reporting.projector import projections_of
from everruns_pipelines.reporting.query import EVERYTHING, expected_rows, selected_rows
from everruns_pipelines.reporting.reconcile import (
    compare_day,
    compare_days,
    days_between,
    materialize_days,
    stage_days,
)
from everruns_pipelines.settings import Settings

EVENTS = 1_000_000
ROUNDS = 5
SMALL_ORG = 1_000
# Of what is missing, in hundredths: the fact, and which of its rows.
LOSSES: tuple[tuple[str, LiteralString, int], ...] = (
    ("fact_tool_call", "true", 55),
    ("fact_turn", "true", 14),
    ("fact_capability_usage", "source_key LIKE '%%:capability_usage:1'", 7),
    ("fact_capability_usage", "source_key LIKE '%%:effect_ran'", 1),
    ("fact_llm_generation", "true", 14),
    ("fact_budget_posting", "true", 8),
    ("fact_session", "true", 1),
)


def main() -> None:
    """Measure, and print the ratios beside their targets."""
    table = Table("what", "measured", "ratio", "target", title="Backfill")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        for row in measure(Path(directory)):
            table.add_row(*row)
    Console(width=110).print(table)


def measure(home: Path) -> Generator[tuple[str, str, str, str]]:
    with database(home, "missing_0") as connection:
        yield from prepare_complete(connection)
    # The digests of the events are kept in all databases but this one.
    with database(home, "first", like="missing_0"):
        pass
    with connected(home, "missing_0") as connection:
        assert enqueue(connection, BackfillRequest())["enqueued"] == 0
    for missing in (1_000, 10_000):
        with database(home, f"missing_{missing}", like="missing_0") as connection:
            lose(connection, missing)
    for name, prepare in (("archived", add_archived), ("orgs", add_organization)):
        with database(home, name, like="missing_0") as connection:
            prepare(connection)
        with connected(home, name) as connection:
            assert enqueue(connection, BackfillRequest())["enqueued"] == 0
    expected = {"first": 0, "missing_0": 0, "missing_1000": 1_000, "missing_10000": 10_000}
    expected |= {"archived": 0, "orgs": 0}
    seconds: dict[str, list[float]] = {"naive": [], **{name: [] for name in expected}, "org": []}
    for _ in range(ROUNDS):
        seconds["naive"].append(backfill_naively(home))
        for name, missing in expected.items():
            seconds[name].append(backfill(home, name, missing))
        seconds["org"].append(backfill(home, "orgs", 0, SMALL_ORG))
    yield from ratios(*(min(times) for times in seconds.values()))
    yield from compare(home)


def ratios(
    naive: float,
    first: float,
    nothing: float,
    few: float,
    many: float,
    archived: float,
    orgs: float,
    org: float,
) -> Generator[tuple[str, str, str, str]]:
    yield (
        f"nothing missing at {EVENTS:,} events, against the naive form",
        f"{nothing:.2f} against {naive:.2f} s",
        f"1/{naive / nothing:.1f}",
        "at most 1/5",
    )
    yield (
        "the same for the first time, when all events are read",
        f"{first:.2f} against {naive:.2f} s",
        f"1/{naive / first:.1f}",
        "",
    )
    for missing, found, target in ((1_000, few, 1.5), (10_000, many, 2.5)):
        yield (
            f"{missing:,} missing, found and enqueued, against nothing missing",
            f"{found:.2f} against {nothing:.2f} s",
            f"{found / nothing:.2f} x",
            f"at most {target} x",
        )
    yield (
        f"nothing missing, {EVENTS:,} archived events beside them",
        f"{archived:.2f} against {nothing:.2f} s",
        f"{archived / nothing:.2f} x",
        "at most 2.2 x",
    )
    yield (
        "one organization with 1/200 of the data, against all",
        f"{org:.3f} against {orgs:.2f} s",
        f"1/{orgs / org:.0f}",
        "at most 1/20",
    )


def compare(home: Path) -> Generator[tuple[str, str, str, str]]:
    """All days of a fact, all right: one pass over the range, against every row of every day."""
    [fact] = [fact for fact in FACTS if fact.table == "fact_tool_call"]
    with connected(home, "missing_0") as connection:
        first, last = connection.execute(
            "SELECT min(time_bucket_day), max(time_bucket_day) FROM fact_tool_call"
        ).fetchall()[0]
        by_day = timed(partial(compare_by_day, connection, fact, first, last))
        for what, work in (("comparing", compare_days), ("materializing", materialize)):
            by_range = timed(partial(work, connection, fact, first, last))
            yield (
                f"{what} {(last - first).days + 1} days of {fact.table}, against comparing each",
                f"{by_range:.2f} against {by_day:.2f} s",
                f"1/{by_day / by_range:.1f}",
                "at most 1/3",
            )


def compare_by_day(connection: Connection, fact: Fact, first: date, last: date) -> object:
    """What is done for days that differ."""
    days = days_between(first, last)
    stage_days(connection, fact, days)
    return {day: compare_day(connection, fact, day) for day in days}


def materialize(connection: Connection, fact: Fact, first: date, last: date) -> object:
    """What a run over the days does."""
    return list(materialize_days(connection, fact, first, last))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def add_archived(connection: Connection) -> None:
    """As many events again, archived, with their facts."""
    connection.execute(
        "INSERT INTO archived_events"
        # Ids are UUIDs of version 7: those of version 4 are others.
        " SELECT overlay(id::text PLACING '4' FROM 15)::uuid, session_id, sequence, event_type,"
        " data, ts, context, metadata, tags, created_at FROM events"
    )
    for fact in FACTS:
        columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in fact.columns)
        for projection in fact.projections:
            if projection.source is EVENT:
                connection.execute(
                    sql.SQL(
                        "INSERT INTO {fact} ({columns}) SELECT {columns} FROM ({rows}) AS expected"
                        " ON CONFLICT DO NOTHING"
                    ).format(
                        fact=sql.Identifier(fact.table),
                        columns=columns,
                        rows=expected_rows(fact, projection, EVERYTHING),
                    )
                )
    connection.execute("VACUUM ANALYZE")


def add_organization(connection: Connection) -> None:
    """An organization with every 200th session, and all that hangs on it."""
    connection.execute("SET session_replication_role = replica")
    connection.execute(
        "INSERT INTO organizations (org_id, public_id, name)"
        " VALUES (%s, 'org_' || repeat('f', 32), 'Small')",
        [SMALL_ORG],
    )
    connection.execute(
        "CREATE TEMPORARY TABLE moved AS SELECT id FROM sessions ORDER BY md5(id::text)"
        " LIMIT (SELECT count(*) / 200 FROM sessions)"
    )
    for table in ("llm_generations", "usage_ledger", *(fact.table for fact in FACTS)):
        connection.execute(
            sql.SQL("UPDATE {} SET org_id = %s WHERE session_id IN (SELECT id FROM moved)").format(
                sql.Identifier(table)
            ),
            [SMALL_ORG],
        )
    connection.execute(
        "UPDATE sessions SET org_id = %s WHERE id IN (SELECT id FROM moved)", [SMALL_ORG]
    )
    # Their budgets stay with the others.
    connection.execute(
        "UPDATE fact_budget_posting SET budget_subject_type = NULL, budget_subject_id = NULL"
        " WHERE org_id = %s",
        [SMALL_ORG],
    )
    connection.execute("VACUUM ANALYZE")


def prepare_complete(connection: Connection) -> Generator[tuple[str, str, str, str]]:
    """Everything is projected, and the outbox remembers it."""
    started = time.perf_counter()
    load_sample_data(connection, events=EVENTS, days=90, projected_share=0.95, enqueued_share=0.0)
    yield (
        f"loading {EVENTS:,} sample events and their sessions",
        f"{time.perf_counter() - started:.0f} s",
        "",
        "at most 60 s",
    )
    insert_bare(connection)
    for source in SOURCES:
        types = {kind for _, part in projections_of(source) for kind in part.event_types}
        connection.execute(
            sql.SQL(
                "INSERT INTO reporting_outbox"
                " (org_id, source_type, source_id, source_version, reason, status)"
                " SELECT org_id, {}, id, id, {}, 'completed' FROM ({}) AS source"
            ).format(
                sql.Literal(source.type),
                sql.Literal(source.reason),
                selected_rows(source, types, EVERYTHING),
            )
        )
    connection.execute("VACUUM ANALYZE")


def lose(connection: Connection, missing: int) -> None:
    """Delete facts of so many sources, spread evenly over all of them."""
    parts = pairwise(accumulate((share for *_, share in LOSSES), initial=0))
    for (table, where, _), (first, last) in zip(LOSSES, parts, strict=True):
        connection.execute(
            sql.SQL(
                "DELETE FROM {0} WHERE (org_id, source_key) IN (SELECT org_id, source_key FROM {0}"
                " WHERE {1} ORDER BY md5(source_key) LIMIT %s)"
            ).format(sql.Identifier(table), sql.SQL(where)),
            [missing * last // 100 - missing * first // 100],
        )
    connection.execute("VACUUM ANALYZE")


def backfill(home: Path, name: str, missing: int, org_id: int | None = None) -> float:
    """The seconds that it takes to find and enqueue so many; what it wrote is taken back."""
    with connected(home, name) as connection, connection.transaction(force_rollback=True):
        started = time.perf_counter()
        counts = enqueue(connection, BackfillRequest(limit=10_000, org_id=org_id))
        seconds = time.perf_counter() - started
    assert counts["enqueued"] == missing, f"{missing} are missing, but enqueued were {counts}"
    return seconds


@contextmanager
def connected(home: Path, name: str) -> Generator[Connection]:
    url = embedded_postgres_url(home, name)
    postgres = PostgresDatabase(Settings.from_environment({"EVERRUNS_POSTGRES_URL": url}))
    with postgres.connect() as connection:
        yield connection


def backfill_naively(home: Path) -> float:
    """The seconds that it takes to find out, by looking up every key, that nothing is missing."""
    with psycopg.connect(embedded_postgres_url(home, "missing_0")) as connection:
        started = time.perf_counter()
        for statement in NAIVE:
            assert connection.execute(statement).fetchall() == []
        return time.perf_counter() - started


NAIVE: tuple[LiteralString, ...] = (
    """
    SELECT events.id
    FROM events
    JOIN sessions ON sessions.id = events.session_id
    WHERE
        event_type IN (
            'tool.completed', 'capability.usage', 'output.message.replaced',
            'turn.completed', 'turn.failed', 'turn.cancelled'
        )
        AND CASE event_type
            WHEN 'tool.completed' THEN
                NOT EXISTS (
                    SELECT FROM fact_tool_call AS fact
                    WHERE fact.org_id = sessions.org_id
                        AND fact.source_key = 'event:' || events.id
                )
                OR data ? 'capability_id' AND NOT EXISTS (
                    SELECT FROM fact_capability_usage AS fact
                    WHERE fact.org_id = sessions.org_id
                        AND fact.source_key = 'event:' || events.id || ':invoked'
                )
            WHEN 'capability.usage' THEN
                EXISTS (
                    SELECT
                    FROM
                        jsonb_array_elements(
                            CASE
                                WHEN jsonb_typeof(data -> 'records') = 'array'
                                    THEN data -> 'records'
                                ELSE '[]'
                            END
                        ) WITH ORDINALITY AS records (record, position)
                    WHERE record ?& ARRAY['capability_id', 'usage_kind'] AND NOT EXISTS (
                        SELECT FROM fact_capability_usage AS fact
                        WHERE fact.org_id = sessions.org_id
                            AND fact.source_key
                                = 'event:' || events.id || ':capability_usage:' || position
                    )
                )
            WHEN 'output.message.replaced' THEN
                data ? 'guardrail_capability_id' AND NOT EXISTS (
                    SELECT FROM fact_capability_usage AS fact
                    WHERE fact.org_id = sessions.org_id
                        AND fact.source_key = 'event:' || events.id || ':effect_ran'
                )
            ELSE NOT EXISTS (
                SELECT FROM fact_turn AS fact
                WHERE fact.org_id = sessions.org_id AND fact.source_key = 'event:' || events.id
            )
        END
    ORDER BY ts
    LIMIT 1000
    """,
    """
    SELECT id FROM sessions
    WHERE NOT EXISTS (
        SELECT FROM fact_session AS fact
        WHERE fact.org_id = sessions.org_id AND fact.source_key = 'session:' || sessions.id
    )
    ORDER BY updated_at
    LIMIT 1000
    """,
    """
    SELECT id FROM llm_generations AS source
    WHERE NOT EXISTS (
        SELECT FROM fact_llm_generation AS fact
        WHERE fact.org_id = source.org_id AND fact.source_key = 'llm_generation:' || source.id
    )
    ORDER BY created_at
    LIMIT 1000
    """,
    """
    SELECT id FROM usage_ledger AS source
    WHERE NOT EXISTS (
        SELECT FROM fact_budget_posting AS fact
        WHERE fact.org_id = source.org_id AND fact.source_key = 'usage_ledger:' || source.id
    )
    ORDER BY created_at
    LIMIT 1000
    """,
)
