"""What projecting costs: against a row-by-row projector, and against a bare INSERT ... SELECT.

Speeds are measured in turn, several times, and the best of each counts: the machine has other
things to do. Also what a claim costs as the queue grows, and how much memory a run takes as the
data grows.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase, transaction
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SOURCES, Fact, Projection, Source
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.drain import drain_in_parallel
from everruns_pipelines.reporting.outbox import Outbox
from everruns_pipelines.reporting.projector import projections_of
from everruns_pipelines.reporting.query import EVERYTHING, projected_rows
from everruns_pipelines.settings import Settings

SOURCE_ROWS = 200_000
ROUNDS = 3
ROW_BY_ROW_SAMPLE = 4_000
CLAIM = 5_000
MAX_ATTEMPTS = 12


def main() -> None:
    """Measure, and print the ratios beside their targets."""
    table = Table("what", "measured", "ratio", "target", title="Projection")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        for row in (*speed(home), *claims(home), *memory(home)):
            table.add_row(*row)
    Console(width=110).print(table)


def speed(home: Path) -> Generator[tuple[str, str, str, str]]:
    with database(home, "sample") as connection:
        sample = load_sample_data(
            connection, events=SOURCE_ROWS, projected_share=0.8, enqueued_share=1.0
        )
        rows = sum(sample.sources.values())
    per_row: list[float] = []
    set_based: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS):
        with database(home, f"row_by_row_{number}", like="sample") as connection:
            connection.prepare_threshold = 5  # as an application's driver does
            seconds, _ = timed(lambda connection=connection: project_row_by_row(connection))
            per_row.append(seconds / ROW_BY_ROW_SAMPLE)
        with database(home, f"set_{number}", like="sample"):
            url = embedded_postgres_url(home, f"set_{number}")
            settings = Settings.from_environment({"EVERRUNS_POSTGRES_URL": url})
            seconds, _ = timed(lambda settings=settings: project(PostgresDatabase(settings)))
            set_based.append(seconds)
        with database(home, f"bare_{number}", like="sample") as connection:
            seconds, _ = timed(lambda connection=connection: insert_bare(connection))
            bare.append(seconds)
    row_by_row, set_seconds, bare_seconds = 1 / min(per_row), min(set_based), min(bare)
    yield (
        f"project {rows:,} source rows, against row by row",
        f"{rows / set_seconds:,.0f} against {row_by_row:,.0f} rows/s",
        f"{rows / set_seconds / row_by_row:.1f} x",
        "at least 20 x",
    )
    yield (
        "the same, against a bare INSERT ... SELECT",
        f"{set_seconds:.1f} against {bare_seconds:.1f} s",
        f"{set_seconds / bare_seconds:.2f} x",
        "at most 2 x",
    )


def claims(home: Path) -> Generator[tuple[str, str, str, str]]:
    seconds: dict[int, float] = {}
    for pending in (10_000, 1_000_000):
        with database(home, f"claims_{pending}") as connection:
            load_sample_data(connection, events=1_000, enqueued_share=0.0)
            connection.execute(
                "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason)"
                " SELECT 1 + n %% 3, 'event', uuidv7()::text, 'event_projection'"
                " FROM generate_series(1, %s) AS n",
                [pending],
            )
            connection.execute("VACUUM ANALYZE reporting_outbox")
            with Outbox.opened(connection, MAX_ATTEMPTS) as outbox:
                cutoff = outbox.cutoff()
                with transaction(connection):
                    outbox.take(CLAIM // 10, cutoff)  # pages are read
                with transaction(connection):
                    seconds[pending], _ = timed(
                        lambda outbox=outbox, cutoff=cutoff: outbox.take(CLAIM, cutoff)
                    )
    few, many = seconds.values()
    yield (
        f"take {CLAIM:,} of 1,000,000 pending, against of 10,000",
        f"{many * 1000:.0f} against {few * 1000:.0f} ms",
        f"{many / few:.2f} x",
        "at most 1.5 x",
    )


def memory(home: Path) -> Generator[tuple[str, str, str, str]]:
    peaks: dict[int, int] = {}
    for events in (10_000, 1_000_000):
        with database(home, f"memory_{events}") as connection:
            load_sample_data(connection, events=events, projected_share=1.0, enqueued_share=1.0)
        url = embedded_postgres_url(home, f"memory_{events}")
        answer = subprocess.run(
            [sys.executable, "-c", "import benchmarks.projection as b; b.print_peak()", url],
            stdout=subprocess.PIPE,
            check=True,
        )
        peaks[events] = int(answer.stdout)
    few, many = peaks.values()
    yield (
        "peak memory projecting 1,000,000 events, against 10,000",
        f"{many / 1024:.0f} against {few / 1024:.0f} MiB",
        f"{many / few:.2f} x",
        "at most 1.2 x",
    )


def print_peak() -> None:
    """Project everything due in the database of the first argument; print the peak in KiB."""
    settings = Settings.from_environment({"EVERRUNS_POSTGRES_URL": sys.argv[1]})
    project(PostgresDatabase(settings))
    # Not getrusage: what it tells began before exec, in the process that started this one.
    print(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def project(postgres: PostgresDatabase) -> None:
    for _ in drain_in_parallel(postgres):
        pass


def insert_bare(connection: Connection) -> None:
    """Fill the empty fact tables with the same rows, and do nothing else."""
    for fact in FACTS:
        columns = sql.SQL(", ").join(sql.Identifier(column.name) for column in fact.columns)
        for projection in fact.projections:
            connection.execute(
                sql.SQL(
                    "INSERT INTO {} ({}) SELECT {} FROM ({}) AS row WHERE rejected IS NULL"
                ).format(
                    sql.Identifier(fact.table),
                    columns,
                    columns,
                    projected_rows(fact, projection, EVERYTHING),
                )
            )


def project_row_by_row(connection: Connection) -> None:
    """Project as an application does it: row by row, each in a transaction of its own."""
    types = {source.type: source for source in SOURCES}
    upserts = {source.type: _upserts(source) for source in SOURCES}
    claimed = connection.execute(
        "UPDATE reporting_outbox SET status = 'processing', attempts = attempts + 1,"
        " claimed_at = now() WHERE id IN (SELECT id FROM reporting_outbox"
        " WHERE status = 'pending' ORDER BY next_attempt_at LIMIT %s FOR UPDATE SKIP LOCKED)"
        " RETURNING id, source_type, source_id",
        [ROW_BY_ROW_SAMPLE],
    ).fetchall()
    for outbox_id, source_type, source_id in claimed:
        with connection.transaction():
            event_type = None
            if types[source_type] is EVENT:
                row = connection.execute("SELECT event_type FROM events WHERE id = %s", [source_id])
                event_type = (row.fetchone() or [None])[0]
            for projection, upsert in upserts[source_type]:
                if event_type is None or event_type in projection.event_types:
                    connection.execute(upsert, {"id": source_id})
            connection.execute(
                "UPDATE reporting_outbox SET status = 'completed' WHERE id = %s", [outbox_id]
            )


_ONE = sql.SQL("JOIN (VALUES (%(id)s::uuid)) AS one (id) ON one.id = source.id")


def _upserts(source: Source) -> list[tuple[Projection, bytes]]:
    return [(projection, _upsert(fact, projection)) for fact, projection in projections_of(source)]


def _upsert(fact: Fact, projection: Projection) -> bytes:
    columns = [sql.Identifier(column.name) for column in fact.columns]
    return (
        sql.SQL(
            "INSERT INTO {} ({}) SELECT {} FROM ({}) AS row WHERE rejected IS NULL"
            " ON CONFLICT (org_id, source_key) DO UPDATE SET {}, projected_at = now()"
        )
        .format(
            sql.Identifier(fact.table),
            sql.SQL(", ").join(columns),
            sql.SQL(", ").join(columns),
            projected_rows(fact, projection, _ONE),
            sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(name) for name in columns),
        )
        .as_bytes()
    )


def timed(run: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


@contextmanager
def database(home: Path, name: str, like: str = "everruns") -> Generator[Connection]:
    """A new database, a copy of another one."""
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(like)
            )
        )
    url = embedded_postgres_url(home, name)
    settings = Settings.from_environment({"EVERRUNS_POSTGRES_URL": url})
    with PostgresDatabase(settings).connect() as connection:
        prepare(connection)
        connection.execute("CHECKPOINT")  # what is timed does not write the copy to disk
        yield connection
