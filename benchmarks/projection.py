"""What projecting costs: against a row-by-row projector, and against a bare INSERT ... SELECT.

On PostgreSQL as it comes: fsync on, 128 MB of shared buffers. Processor time counts, the server's
and ours: the machine has other things to do. What is compared is measured in turn, several times,
and the least counts. Also what the application's enqueues wait for beside a drain, what failing
rows cost, whether the end of a long queue is as fast as its beginning, and how much memory a run
takes as the data grows.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from uuid import uuid4

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url, stop_server
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SOURCES, Fact, Projection, Source
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.drain import drain, drain_in_parallel
from everruns_pipelines.reporting.projector import projections_of
from everruns_pipelines.reporting.query import EVERYTHING, projected_rows
from everruns_pipelines.settings import Settings

SOURCE_ROWS = 200_000
LONG_QUEUE = 1_000_000
ROUNDS = 5
ROW_BY_ROW_SAMPLE = 20_000
FAILING = 37  # of 5,000
ENQUEUE_SECONDS = 5
_TICKS = os.sysconf("SC_CLK_TCK")

Row = tuple[str, str, str, str]


def main() -> None:
    """Measure, and print the ratios beside their targets."""
    table = Table("what", "measured", "ratio", "target", title="Projection")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        subprocess.run(
            [sys.executable, "-c", "import benchmarks.projection as b; b.configure()", directory],
            check=True,
        )
        for row in (
            *speed(home),
            *enqueues(home),
            *failing(home),
            *long_queue(home),
            *memory(home),
            *over_tcp(home),  # the last one: it leaves no server
        ):
            table.add_row(*row)
    Console(width=120).print(table)


def configure() -> None:
    """Give the embedded server of the first argument PostgreSQL's own defaults. Stops it: what it
    is given holds from its next start on.
    """
    home = Path(sys.argv[1])
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET shared_buffers = '128MB'")
        connection.execute("ALTER SYSTEM SET max_wal_size = '1GB'")
    stop_server(home)


@dataclass(frozen=True)
class Cost:
    """What something took, in seconds: by the clock, and of processors."""

    wall: float
    processor: float


def measured(home: Path, work: Callable[[], object]) -> Cost:
    """What `work` takes, in this process and in the server."""
    server, client, started = server_seconds(home), time.process_time(), time.perf_counter()
    work()
    wall = time.perf_counter() - started
    return Cost(wall, server_seconds(home) - server + time.process_time() - client)


def server_seconds(home: Path) -> float:
    """Processor time of the embedded server: of all its processes, ended ones included."""
    postmaster = int((home / "postgres" / "postmaster.pid").read_text().split()[0])
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(process.name) == postmaster:
            ticks += sum(int(field) for field in fields[11:15])
        elif int(fields[1]) == postmaster:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def speed(home: Path) -> Generator[Row]:
    with database(home, "sample") as connection:
        sample = load_sample_data(
            connection, events=SOURCE_ROWS, projected_share=0.8, enqueued_share=1.0
        )
        rows = sum(sample.sources.values())
        # So that no vacuum of what was loaded is counted as part of what follows.
        connection.execute("VACUUM ANALYZE")
    per_row: list[Cost] = []
    projected: list[Cost] = []
    alone: list[Cost] = []
    bare: list[Cost] = []
    bare_twice: list[Cost] = []
    for number in range(ROUNDS):
        per_row.append(row_by_row(home, number))
        with passing(home, f"bare_{number}", like="sample") as connection:
            bare.append(measured(home, lambda c=connection: insert_bare(c)))
        projected.append(set_based(home, number))
        with passing(home, f"by_one_{number}", like="sample") as connection:
            alone.append(measured(home, lambda c=connection: project_alone(c)))
        with passing(home, f"twice_{number}", like="sample"):
            postgres = postgres_of(home, f"twice_{number}")
            bare_twice.append(measured(home, lambda p=postgres: insert_bare_halves(p)))

    def row(
        what: str, of: str, base: list[Cost], target: str, costs: list[Cost] = projected
    ) -> Row:
        ours, theirs = least(costs, of), least(base, of)
        scale = 1e6 / rows
        return (
            what,
            f"{ours * scale:.1f} against {theirs * scale:.1f} us a row",
            f"{ours / theirs:.2f} x",
            target,
        )

    yield row(
        f"project {rows:,} source rows, against a bare insert: processor time",
        "processor",
        bare,
        "at most 2.5 x",
    )
    # Two at once: where two processors share a core, each takes longer for the same work.
    yield row("the same, against two bare inserts: processor time", "processor", bare_twice, "")
    yield row("one projector, against one: processor time", "processor", bare, "", alone)
    yield row("two projectors, against one bare insert: wall", "wall", bare, "at most 1.4 x")
    yield row("two projectors, against two bare inserts: wall", "wall", bare_twice, "at most 1.8 x")
    yield against_row_by_row("", rows, projected, per_row)


def least(costs: Sequence[Cost], of: str) -> float:
    return min(float(getattr(cost, of)) for cost in costs)


def against_row_by_row(
    where: str, rows: int, projected: Sequence[Cost], row_by_row: Sequence[Cost]
) -> Row:
    theirs = ROW_BY_ROW_SAMPLE / least(row_by_row, "wall")
    ours = rows / least(projected, "wall")
    return (
        f"against row by row ({ROW_BY_ROW_SAMPLE:,} rows){where}: wall",
        f"{ours:,.0f} against {theirs:,.0f} rows/s",
        f"{ours / theirs:.1f} x",
        "at least 25 x",
    )


def row_by_row(home: Path, number: int) -> Cost:
    with passing(home, f"row_by_row_{number}", like="sample") as connection:
        connection.prepare_threshold = 5  # as an application's driver does
        return measured(home, lambda: project_row_by_row(connection))


def set_based(home: Path, number: int) -> Cost:
    name = f"set_{number}"
    with passing(home, name, like="sample"):
        postgres = postgres_of(home, name)
        return measured(home, lambda: project(postgres))


def over_tcp(home: Path) -> Generator[Row]:
    """The same on a server that is reached over TCP alone. Stops the server."""
    answer = subprocess.run(
        [sys.executable, "-c", "import benchmarks.projection as b; b.print_over_tcp()", home],
        stdout=subprocess.PIPE,
        check=True,
    )
    what, figures, ratio, target = json.loads(answer.stdout)
    yield what, figures, ratio, target


def print_over_tcp() -> None:
    """Start the server of the first argument anew, over TCP, measure, and stop it."""
    home = Path(sys.argv[1])
    data = home / "postgres"
    postmaster = (data / "postmaster.pid").read_text().split()[0]
    pg_ctl = Path(f"/proc/{postmaster}/exe").resolve().with_name("pg_ctl")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def control(*arguments: str | Path) -> None:
        subprocess.run(
            [pg_ctl, "-D", data, "-w", *arguments],
            stdout=subprocess.DEVNULL,
            user=data.stat().st_uid,
            check=True,
        )

    control("stop")
    control("start", "-l", data / "log", "-o", f"-h 127.0.0.1 -p {port} -k ''")
    with psycopg.connect(embedded_postgres_url(home, "sample")) as connection:
        assert connection.info.host == "127.0.0.1"
        [(rows,)] = connection.execute("SELECT count(*) FROM reporting_outbox").fetchall()
    costs = [(set_based(home, n), row_by_row(home, n)) for n in range(ROUNDS, 2 * ROUNDS)]
    projected, per_row = zip(*costs, strict=True)
    print(json.dumps(against_row_by_row(", over TCP", rows, projected, per_row)))
    control("stop")


def enqueues(home: Path) -> Generator[Row]:
    """How long the application waits for its enqueues: for its turn on a processor, and for its own
    commit, which waits until the disk has all that anybody has written. Where a drain uses every
    processor, its turn is most of it: so it is beside as many loops that know no database.
    """
    alone: list[float] = []
    beside: list[float] = []
    beside_loops: list[float] = []
    for number in range(ROUNDS):
        for name, times, work in (
            ("alone", alone, do_nothing),
            ("beside", beside, project),
            ("beside_loops", beside_loops, compute),
        ):
            with passing(home, f"{name}_{number}", like="sample"):
                times += enqueue_times(postgres_of(home, f"{name}_{number}"), work)

    def slowest(times: list[float]) -> float:
        return 1000 * sorted(times)[len(times) * 99 // 100]

    for what, times, target in (
        ("a full drain", beside, "at most 2 x, under 300 ms"),
        ("two loops that compute", beside_loops, ""),
    ):
        yield (
            f"an enqueue of the application beside {what}, 99th percentile",
            f"{slowest(times):.1f} against {slowest(alone):.1f} ms without",
            f"{slowest(times) / slowest(alone):.1f} x",
            target,
        )


def do_nothing(_: PostgresDatabase) -> None:
    time.sleep(ENQUEUE_SECONDS)


def compute(postgres: PostgresDatabase) -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        do_nothing(postgres)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def enqueue_times(
    postgres: PostgresDatabase, work: Callable[[PostgresDatabase], None]
) -> list[float]:
    """Enqueue 100 rows a second while `work` is done; the seconds that each took."""
    over = Event()
    times: list[float] = []

    def enqueue() -> None:
        with postgres.connect() as connection:
            while not over.wait(0.01):
                source_id = str(uuid4())
                started = time.perf_counter()
                connection.execute(_ENQUEUE, {"source_id": source_id})
                times.append(time.perf_counter() - started)

    with ThreadPoolExecutor(1) as executor:
        enqueueing = executor.submit(enqueue)
        try:
            work(postgres)
        finally:
            over.set()
        enqueueing.result()
    return times


_ENQUEUE = """
INSERT INTO reporting_outbox (org_id, source_type, source_id, source_version, reason)
VALUES (1, 'event', %(source_id)s, %(source_id)s, 'event_projection')
ON CONFLICT (org_id, source_type, source_id, source_version, reason) DO UPDATE
SET status = CASE
        WHEN reporting_outbox.status = 'completed' THEN 'pending' ELSE reporting_outbox.status
    END,
    next_attempt_at = now(),
    updated_at = now()
"""


def failing(home: Path) -> Generator[Row]:
    """What rows cost that a constraint refuses."""
    costs: dict[int, float] = {}
    for count in (0, FAILING):
        least: list[float] = []
        for number in range(ROUNDS):
            name = f"failing_{count}_{number}"
            with passing(home, name, like="sample") as connection:
                connection.execute(
                    "DELETE FROM reporting_outbox WHERE id NOT IN"
                    " (SELECT id FROM reporting_outbox WHERE source_type = 'event'"
                    " ORDER BY source_id LIMIT 5000)"
                )
                connection.execute(
                    sql.SQL(
                        "ALTER TABLE fact_tool_call ADD CHECK (source_key <> ALL ({})) NOT VALID"
                    ).format(sql.Literal(tool_calls(connection, count)))
                )
                postgres = postgres_of(home, name)
                least.append(measured(home, lambda p=postgres: project(p)).processor)
        costs[count] = min(least)
    clean, dear = costs.values()
    yield (
        f"project 5,000 rows of which {FAILING} fail, against none: processor time",
        f"{dear * 1000:.0f} against {clean * 1000:.0f} ms",
        f"{dear / clean:.2f} x",
        "at most 3 x",
    )


def tool_calls(connection: Connection, count: int) -> list[str]:
    """Source keys of tool calls that are enqueued."""
    rows = connection.execute(
        "SELECT 'event:' || event.id FROM events AS event"
        " JOIN reporting_outbox ON source_id = event.id::text"
        " WHERE event_type = 'tool.completed' ORDER BY md5(source_id) LIMIT %s",
        [count],
    )
    return [key for (key,) in rows]


def long_queue(home: Path) -> Generator[Row]:
    """Is the end of a long queue as fast as its beginning?"""
    with passing(home, "long") as connection:
        load_sample_data(connection, events=LONG_QUEUE, projected_share=0.9, enqueued_share=1.0)
        connection.execute("VACUUM ANALYZE")
        rows = connection.execute("SELECT count(*) FROM reporting_outbox").fetchone()
        assert rows is not None
        tenth = rows[0] // 10
        done, marks = 0, [(0, server_seconds(home))]
        for batch in drain_in_parallel(postgres_of(home, "long")):
            done += batch.claimed
            marks.append((done, server_seconds(home)))
    first = next(mark for mark in marks if mark[0] >= tenth)
    last = next(mark for mark in marks if mark[0] >= done - tenth)
    at_first = (first[1] - marks[0][1]) / first[0]
    at_last = (marks[-1][1] - last[1]) / (done - last[0])
    yield (
        f"the last tenth of {done:,} rows, against the first: the server's processor time",
        f"{at_last * 1e6:.1f} against {at_first * 1e6:.1f} us a row",
        f"{at_last / at_first:.2f} x",
        "about 1 x",
    )


def memory(home: Path) -> Generator[tuple[str, str, str, str]]:
    peaks: dict[int, int] = {}
    for events in (10_000, 1_000_000):
        with passing(home, f"memory_{events}") as connection:
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


def project_alone(connection: Connection) -> None:
    for _ in drain(connection, max_attempts=12):
        pass


def postgres_of(home: Path, name: str) -> PostgresDatabase:
    url = embedded_postgres_url(home, name)
    return PostgresDatabase(Settings.from_environment({"EVERRUNS_POSTGRES_URL": url}))


# Half of the sources: those of sessions, or without one, whose id is even or odd.
_HALVES = [
    sql.SQL(
        "JOIN (SELECT) AS half ON hashtext(coalesce({session_id}, source.id)::text) & 1 = " + half
    )
    for half in ("0", "1")
]


def insert_bare_halves(postgres: PostgresDatabase) -> None:
    """The same by two connections side by side, each a half."""

    def insert(half: sql.SQL) -> None:
        with postgres.connect() as connection:
            insert_bare(connection, half)

    with ThreadPoolExecutor(len(_HALVES)) as executor:
        list(executor.map(insert, _HALVES))


def insert_bare(connection: Connection, selection: sql.SQL = EVERYTHING) -> None:
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
                    projected_rows(fact, projection, selection),
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


@contextmanager
def passing(home: Path, name: str, like: str = "everruns") -> Generator[Connection]:
    """The same for a while: else autovacuum would work on it beside what is timed next."""
    with database(home, name, like) as connection:
        yield connection
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
