"""Do plans hold while tables grow, and nobody analyzes them?

One database grows from empty to eight million events: with facts, queue and all indexes, autovacuum
off, and not one ANALYZE. At each size a few thousand rows are projected, by a projector that has
been there since the database was empty, and by a new one. What its process of the server takes for
a row counts, and how many rows and entries of indexes it reads: the least of several times, since
the first of them plans.
"""

import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from benchmarks.projection import Row, database, postgres_of
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url, stop_server
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.batch import Drained
from everruns_pipelines.reporting.catalog import FACTS, SOURCES
from everruns_pipelines.reporting.drain import drain

SIZES = (0, 100_000, 1_000_000, 8_000_000)  # events
ROUNDS = 3  # of each projector, at each size
COPY = 5_000  # events
NAME = "growing"

_QUEUE = "reporting_outbox"
_SOURCES = [source.table for source in SOURCES]
_FACTS = [fact.table for fact in FACTS]
_COPIES_AT_ONCE = 20
_FIRST_DIGITS = 0x0200  # of the ids of the first copy
_LAST_COPY = 2_000
# Of the load, which analyzes what it fills.
_FORGET_STATISTICS = """
SELECT pg_clear_relation_stats(schemaname, tablename),
    (
        SELECT count(pg_clear_attribute_stats(schemaname, tablename, attname, inherited))
        FROM pg_stats
        WHERE pg_stats.schemaname = pg_tables.schemaname
            AND pg_stats.tablename = pg_tables.tablename
    )
FROM pg_tables
WHERE schemaname = 'public'
"""
_SETTINGS = {"autovacuum": "off", "fsync": "off", "max_wal_size": "4GB"}


def main() -> None:
    """Measure, and print the ratios beside their targets."""
    table = Table("what", "measured", "ratio", "target", title="Plans")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        subprocess.run(
            [sys.executable, "-c", "import benchmarks.plans as b; b.configure()", directory],
            check=True,
        )
        for row in measure(Path(directory)):
            table.add_row(*row)
    Console(width=120).print(table)


def configure() -> None:
    """Have the embedded server of the first argument vacuum and analyze nothing by itself. Stops
    it: what it is given holds from its next start on.
    """
    home = Path(sys.argv[1])
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as connection:
        for name, value in _SETTINGS.items():
            connection.execute(
                sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
            )
    stop_server(home)


@dataclass(frozen=True)
class Cost:
    """What a row took: microseconds of the server's process, and rows and entries read."""

    microseconds: float
    read: float

    def __str__(self) -> str:
        return f"{self.microseconds:.1f} us and {self.read:.1f} read"


def measure(home: Path) -> Generator[Row]:
    first: dict[str, Cost] = {}
    with database(home, NAME) as connection:
        copies = Copies(home, connection)
        with projector(home) as old:
            for size in SIZES:
                copies.grow(size)
                with projector(home) as new:
                    for who, at_work in (("an old projector", old), ("a new one", new)):
                        cost = least(copies.projected(*at_work) for _ in range(ROUNDS))
                        base = first.setdefault(who, cost)
                        yield (
                            f"a row at {size:,} events, against the first: {who}",
                            f"{cost} against {base}",
                            f"{cost.microseconds / base.microseconds:.2f} x",
                            "about 1 x",
                        )
        statistics = connection.execute(
            "SELECT count(*) FROM pg_stats WHERE schemaname = 'public'"
        ).fetchone()
        assert statistics == (0,)


def least(costs: Iterable[Cost]) -> Cost:
    return min(costs, key=lambda cost: cost.microseconds)


@contextmanager
def projector(home: Path) -> Generator[tuple[Connection, Generator[Drained]]]:
    """One that stays, and the connection that it works on."""
    with (
        postgres_of(home, NAME).connect() as connection,
        closing(
            drain(connection, max_attempts=12, batch_size=1000, linger_seconds=3600)
        ) as batches,
    ):
        yield connection, batches


@dataclass
class Copies:
    """Copies of a small data set, each under ids of its own, and a day later than the one before.

    What they are copies of lies in the schema `base`.
    """

    home: Path
    connection: Connection
    copies: int = 0
    kept: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        load_sample_data(self.connection, events=COPY, projected_share=0.8, enqueued_share=1.0)
        self.connection.execute("CREATE SCHEMA base")
        self._keep([*_SOURCES, _QUEUE])
        for table in self.kept:
            self.connection.execute(sql.SQL("TRUNCATE {} CASCADE").format(sql.Identifier(table)))
        self.connection.execute(_FORGET_STATISTICS)

    def grow(self, events: int) -> None:
        """Add copies that are projected, until there are so many events."""
        others = [table for table in self.kept if table != "events"]
        with ThreadPoolExecutor(2) as executor:
            while self.copies * COPY < events:
                first = self.copies + 1
                self.copies = min(self.copies + _COPIES_AT_ONCE, events // COPY)
                # Side by side: either takes as long as the other.
                copying = [
                    executor.submit(self._copy, tables, first, "completed")
                    for tables in (["events"], others)
                ]
                for half in copying:
                    half.result()
        self.connection.execute("CHECKPOINT")

    def projected(self, worker: Connection, batches: Generator[Drained]) -> Cost:
        """What it takes to project another copy."""
        self.copies += 1
        self._copy([*_SOURCES, _QUEUE], self.copies, "pending")
        took, read, rows = processor_seconds(worker), self._read(worker), 0
        [(enqueued,)] = self.connection.execute("SELECT count(*) FROM base.reporting_outbox")
        while rows < enqueued:
            rows += next(batches).completed
        cost = Cost(
            1e6 * (processor_seconds(worker) - took) / rows, (self._read(worker) - read) / rows
        )
        if not set(_FACTS) & set(self.kept):
            self._keep(_FACTS)
        return cost

    def _keep(self, tables: list[str]) -> None:
        for table in tables:
            self.connection.execute(
                sql.SQL("CREATE TABLE base.{0} AS TABLE {0}").format(sql.Identifier(table))
            )
        self.kept += tables

    def _copy(self, tables: Iterable[str], first: int, status: str) -> None:
        """Make the copies from number `first` to the last one of these tables."""
        with psycopg.connect(embedded_postgres_url(self.home, NAME), autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")
            for table in tables:
                columns = connection.execute(
                    "SELECT attname, atttypid::regtype::text FROM pg_attribute"
                    " WHERE attrelid = %s::regclass AND attnum > 0 AND attgenerated = ''",
                    [table],
                ).fetchall()
                connection.execute(
                    sql.SQL(
                        "INSERT INTO {table} ({columns}) SELECT {values} FROM base.{table},"
                        " generate_series({first}, {last}) AS copy ORDER BY copy"
                    ).format(
                        table=sql.Identifier(table),
                        columns=sql.SQL(", ").join(sql.Identifier(name) for name, _ in columns),
                        values=sql.SQL(", ").join(
                            copied(table, name, type_, status) for name, type_ in columns
                        ),
                        first=first,
                        last=self.copies,
                    )
                )

    def _read(self, worker: Connection) -> int:
        """Rows and entries of indexes that were read, by all."""
        worker.execute("SELECT pg_stat_force_next_flush()")
        [(read,)] = self.connection.execute(
            "SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes)"
            " + (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'public')"
        )
        return int(read)


def copied(table: str, name: str, type_: str, status: str) -> sql.Composable:
    """The value of the column in a copy of its row."""
    column = sql.Identifier(name)
    later = sql.SQL("copy - {}").format(_LAST_COPY)  # days
    digits = sql.SQL("lpad(to_hex({} + copy), 4, '0')").format(_FIRST_DIGITS)
    if table == _QUEUE and name == "status":
        return sql.Literal(status)
    if table == _QUEUE and type_.startswith("timestamp"):
        return sql.SQL("CASE WHEN {} IS NOT NULL THEN now() END").format(column)
    if name in ("id", "session_id", "event_id", "journal_id"):
        return sql.SQL("overlay({}::text PLACING {} FROM 1)::uuid").format(column, digits)
    if name == "source_id" or name == "source_version":
        return sql.SQL("overlay({} PLACING {} FROM 1)").format(column, digits)
    if name == "source_key":
        return sql.SQL("overlay({0} PLACING {1} FROM strpos({0}, ':') + 1)").format(column, digits)
    if type_.startswith("timestamp"):
        return sql.SQL("{} + ({}) * interval '1 day'").format(column, later)
    if type_ == "date":
        return sql.SQL("{} + ({})").format(column, later)
    return column


def processor_seconds(connection: Connection) -> float:
    """What the connection's process of the server has taken."""
    told = Path(f"/proc/{connection.info.backend_pid}/schedstat").read_text()
    return int(told.split()[0]) / 1e9
