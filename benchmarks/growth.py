"""How a look at everything grows with the data: at eight million events, against one million.

Only what the look reads is there, tables and few indexes: so the other seven million are copied in
minutes.
"""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from psycopg import sql
from rich.console import Console
from rich.table import Table

from benchmarks.backfill import connected, prepare_complete
from benchmarks.projection import Row, database
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.backfill import look
from everruns_pipelines.reporting.catalog import FACTS, SOURCES

EVENTS = 1_000_000
TIMES = 8
ROUNDS = 3
# In place of the 7 that UUIDs of version 7 have: as many other ids as there are copies.
COPIES = "1234568"
NAME = "growing"
TABLES = (*(source.table for source in SOURCES), *(fact.table for fact in FACTS))


def main() -> None:
    """Measure, and print the ratios beside their targets."""
    table = Table("what", "measured", "ratio", "target", title="Growth")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        with database(home, NAME) as connection:
            for _ in prepare_complete(connection):
                pass
        for row in measure(home):
            table.add_row(*row)
    Console(width=110).print(table)


def measure(home: Path) -> Generator[Row]:
    with connected(home, NAME) as connection:
        drop_indexes(connection)
    small, _ = looked(home)
    with connected(home, NAME) as connection:
        grow(connection)
    large, spilled = looked(home)
    yield (
        f"nothing missing at {TIMES * EVENTS:,} events, against {EVENTS:,}",
        f"{large:.2f} against {small:.2f} s",
        f"{large / small:.1f} x",
        "at most 9 x",
    )
    yield (f"spilled to disk at {TIMES * EVENTS:,} events", f"{spilled:,} bytes", "", "0 bytes")


def looked(home: Path) -> tuple[float, int]:
    """The seconds that a look takes once digests are kept, and the bytes that it spills."""
    seconds: list[float] = []
    spilled = 0
    for _ in range(1 + ROUNDS):
        before = bytes_spilled(home)
        with connected(home, NAME) as connection:
            started = time.perf_counter()
            found = look(connection)
            seconds.append(time.perf_counter() - started)
        assert not any(missing.sources for missing in found.values())
        spilled = bytes_spilled(home) - before
    return min(seconds[1:]), spilled


def bytes_spilled(home: Path) -> int:
    """By all connections to the database that are closed."""
    with connected(home, NAME) as connection:
        [(spilled,)] = connection.execute(
            "SELECT temp_bytes FROM pg_stat_database WHERE datname = current_database()"
        ).fetchall()
    return spilled


def drop_indexes(connection: Connection) -> None:
    """Drop all but what `sessions` has, and empty the outbox, which is not read either."""
    connection.execute("TRUNCATE reporting_outbox")
    for table in set(TABLES) - {"sessions"}:
        keys = connection.execute(
            "SELECT conname FROM pg_constraint WHERE conrelid = %s::regclass"
            " AND contype IN ('p', 'u', 'f')",
            [table],
        ).fetchall()
        for (key,) in keys:
            connection.execute(
                sql.SQL("ALTER TABLE {} DROP CONSTRAINT {} CASCADE").format(
                    sql.Identifier(table), sql.Identifier(key)
                )
            )
        indexes = connection.execute(
            "SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid"
            " WHERE indrelid = %s::regclass",
            [table],
        ).fetchall()
        for (index,) in indexes:
            connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(index)))
    connection.execute("VACUUM ANALYZE")


def grow(connection: Connection) -> None:
    """Copy sessions and all that hangs on them, under other ids."""
    connection.execute("SET session_replication_role = replica")
    for table in TABLES:
        columns = [
            name
            for (name,) in connection.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
                " AND NOT attisdropped AND attgenerated = ''",
                [table],
            )
        ]
        connection.execute(
            sql.SQL(
                "INSERT INTO {table} ({columns}) SELECT {values} FROM {table},"
                " unnest(string_to_array({copies}, NULL)) AS version"
            ).format(
                table=sql.Identifier(table),
                columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
                values=sql.SQL(", ").join(map(copied, columns)),
                copies=sql.Literal(COPIES),
            )
        )
    connection.execute("VACUUM ANALYZE")


def copied(column: str) -> sql.Composable:
    """The value of the column in a copy of its row."""
    name = sql.Identifier(column)
    if column in ("id", "session_id"):
        return sql.SQL("overlay({}::text PLACING version FROM 15)::uuid").format(name)
    if column == "source_key":
        return sql.SQL("overlay({0} PLACING version FROM strpos({0}, ':') + 15)").format(name)
    return name
