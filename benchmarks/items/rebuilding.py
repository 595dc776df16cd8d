"""What a rebuild of items costs, as ratios within one run: in two generations of the span table.

5 million spans are made inside ClickHouse; among them a session of 100,000 items and one of 50.
Compared are the rebuild, the item-by-item way (json.loads and one upsert per item), and the bare
pipe (the same rows as TSV into COPY and one merge that trusts every envelope). Each is timed
several times in turn and the best time counts: the machine has other things to do.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

from benchmarks.items._spans import PROJECT, add_project, make_items, make_noise
from benchmarks.items._table import Row, row, show, timed
from everruns_pipelines.databases.clickhouse import ClickHouse, ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.items.accounting import Rebuilt
from everruns_pipelines.items.rebuild import rebuild
from everruns_pipelines.items.scope import RebuildRequest
from everruns_pipelines.items.span_table import Selection, SpanTable
from everruns_pipelines.settings import Settings

SPANS = 5_000_000
ITEMS = 100_000
ROUNDS = 6
NOTHING = "aaaaaaaa-0000-4000-8000-00000000000f"
LARGE = "aaaaaaaa-0000-4000-8000-000000000001"
SMALL = "aaaaaaaa-0000-4000-8000-000000000002"
MEMORY_LARGE = "aaaaaaaa-0000-4000-8000-000000000003"
MEMORY_SMALL = "aaaaaaaa-0000-4000-8000-000000000004"

# The table's script, and how much of it a session of 50 items may read.
TABLES = {"2024": ("otel_traces.sql", 0.05), "newest": ("otel_traces_newest_text.sql", 0.01)}


def main() -> None:
    """Measure on one table after the other, and print all of it."""
    show(measured for table in TABLES for measured in measure(table))


def measure(table: str) -> Iterator[Row]:
    script, bound = TABLES[table]
    with tempfile.TemporaryDirectory(prefix="everruns-bench-", ignore_cleanup_errors=True) as home:
        settings = Settings.from_environment(
            {"EVERRUNS_HOME": home, "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{home}/spans"}
        )
        bench = Bench(table, PostgresDatabase(settings), ClickHouseDatabase(settings))
        with timed() as took:
            bench.prepare(script)
        print(f"{table}: {SPANS:,} spans made in {took():.0f} s", file=sys.stderr)
        yield bench.rows_read(bound)
        yield from bench.speed()
        yield from bench.memory(Path(home))


@dataclass(frozen=True)
class Bench:
    table: str
    postgres: PostgresDatabase
    clickhouse: ClickHouseDatabase

    def prepare(self, script: str) -> None:
        with self.postgres.connect() as connection:
            add_project(connection)
        with self.clickhouse.connect() as clickhouse:
            for statement in span_tables(script):
                clickhouse.client.command(statement)
            for start in range(0, SPANS, 500_000):
                make_noise(clickhouse, start, min(SPANS, 500_000))
            make_items(clickhouse, SMALL, 50)
            make_items(clickhouse, LARGE, ITEMS)
            for session, number in ((MEMORY_SMALL, 1_000), (MEMORY_LARGE, ITEMS)):
                make_items(clickhouse, session, number)
                make_items(clickhouse, session, 1_000, per_span=1_000)
                make_items(clickhouse, session, 1, padding=2_000_000)
            # Else the engine would merge parts beside whatever is measured.
            clickhouse.client.command("OPTIMIZE TABLE otel_traces FINAL")

    def speed(self) -> Iterator[Row]:
        """The three ways on new items and on unchanged ones."""
        ways: dict[str, Callable[[], object]] = {
            "rebuild": self.rebuild,
            "by_item": self.item_by_item,
            "bare": self.bare_pipe,
        }
        new: dict[str, list[float]] = {name: [] for name in ways}
        unchanged: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                self.empty()
                for times in (new[name], unchanged[name]):
                    with timed() as took:
                        way()
                    times.append(took())
        for what, times, target in (("new", new, 3), ("unchanged", unchanged, 5)):
            best = {name: min(values) for name, values in times.items()}
            print(what, {name: round(value, 2) for name, value in best.items()}, file=sys.stderr)
            ratio = best["by_item"] / best["rebuild"]
            told = f"{self.table}: {ITEMS:,} {what} items,"
            yield row(f"{told} times the item-by-item way", ratio, target)
            ratio = best["rebuild"] / best["bare"]
            yield row(f"{told} time over the bare pipe's", ratio, 1.5, below=True)

    def rows_read(self, bound: float) -> Row:
        """Rows that ClickHouse selects for a session of 50 items, over all rows."""
        with self.clickhouse.connect() as clickhouse:
            before = selected_rows(clickhouse)
            read(clickhouse, SMALL, lambda _chunk: None)
            share = (selected_rows(clickhouse) - before) / SPANS
        what = f"{self.table}: a session of 50 items, rows read of a full scan's"
        return row(what, share, bound, below=True)

    def memory(self, home: Path) -> Iterator[Row]:
        """Peak memory of a rebuild in a process of its own."""
        empty, small, large = (
            min(peak(home, session) for _ in range(2))
            for session in (NOTHING, MEMORY_SMALL, MEMORY_LARGE)
        )
        print(f"peak MiB: {empty:.0f} {small:.0f} {large:.0f}", file=sys.stderr)
        told = f"{self.table}: peak memory"
        yield row(f"{told}, 100,000 items over 1,000", large / small, 1.2, below=True)
        yield row(f"{told} above an empty run's, MiB", large - empty, 256, below=True)

    def empty(self) -> None:
        with self.postgres.connect() as connection:
            connection.execute("TRUNCATE items, item_links")
            connection.execute("VACUUM (ANALYZE) items")
            connection.execute("CHECKPOINT")

    def rebuild(self, session: str = LARGE) -> Rebuilt:
        request = RebuildRequest("acme", "red", "webapp", session)
        return rebuild(self.postgres, self.clickhouse, request, lambda _message: None)

    def item_by_item(self) -> None:
        with self.postgres.connect() as connection:  # Each upsert a transaction, as an API does.
            connection.prepare_threshold = 5  # as its driver does
            rest = b""

            def take(chunk: bytes) -> None:
                nonlocal rest
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    upsert_items(connection, line)

            with self.clickhouse.connect() as clickhouse:
                read(clickhouse, LARGE, take)

    def bare_pipe(self) -> None:
        with self.postgres.connect() as connection, connection.transaction():
            connection.execute(_BARE_STAGING)
            with (
                self.clickhouse.connect() as clickhouse,
                connection.cursor().copy("COPY bare FROM STDIN") as copy,
            ):
                read(clickhouse, LARGE, copy.write)
            connection.execute(_BARE_MERGE, [PROJECT])


_UPSERT: LiteralString = """
INSERT INTO items (
    organization_id, project_id, item_type, title, ref, data, source, session_id, trace_id,
    span_id, capability, capability_version, schema_ref, dedupe_key, created_at
)
SELECT
    organization_id, %(project)s, %(item_type)s, %(title)s, %(ref)s, %(data)s, 'extracted',
    %(session_id)s, %(trace_id)s, %(span_id)s, %(capability)s, %(capability_version)s,
    %(schema_ref)s, %(dedupe_key)s, to_timestamp(%(ended)s)
FROM item_workspaces
ON CONFLICT (project_id, dedupe_key) DO UPDATE SET
    item_type = excluded.item_type, title = excluded.title, ref = excluded.ref,
    data = excluded.data, session_id = excluded.session_id, trace_id = excluded.trace_id,
    span_id = excluded.span_id, capability = excluded.capability,
    capability_version = excluded.capability_version, schema_ref = excluded.schema_ref,
    updated_at = now()
WHERE (items.title, items.ref, items.data) IS DISTINCT FROM
    (excluded.title, excluded.ref, excluded.data)
"""

_BARE_STAGING: LiteralString = """
CREATE TEMP TABLE bare (
    trace_id text, span_id text, run_id text, project text, ended_ns bigint, whole boolean,
    refused boolean, state text, outputs text STORAGE EXTERNAL, objects text STORAGE EXTERNAL,
    complete boolean
) ON COMMIT DROP
"""

_BARE_MERGE: LiteralString = """
INSERT INTO items (
    organization_id, project_id, item_type, title, ref, data, source, session_id, trace_id,
    span_id, capability, capability_version, schema_ref, dedupe_key, created_at
)
SELECT
    workspace.organization_id, %s, value ->> 'item_type', value ->> 'title', value ->> 'ref',
    value -> 'data', 'extracted', (value ->> 'session_id')::uuid,
    coalesce(value ->> 'trace_id', bare.trace_id), coalesce(value ->> 'span_id', bare.span_id),
    value ->> 'capability', value ->> 'capability_version', value ->> 'schema_ref',
    value ->> 'dedupe_key', to_timestamp(bare.ended_ns / 1e9)
FROM bare
CROSS JOIN item_workspaces AS workspace
CROSS JOIN LATERAL (SELECT bare.objects::jsonb AS objects OFFSET 0) AS parsed
CROSS JOIN LATERAL jsonb_array_elements(bare.outputs::jsonb) AS listed (output)
CROSS JOIN LATERAL (
    SELECT parsed.objects -> (output ->> 'hash') -> 'value' AS value OFFSET 0
) AS object
WHERE output ->> 'name' = 'item'
ON CONFLICT (project_id, dedupe_key) DO UPDATE SET
    item_type = excluded.item_type, title = excluded.title, ref = excluded.ref,
    data = excluded.data, session_id = excluded.session_id, trace_id = excluded.trace_id,
    span_id = excluded.span_id, capability = excluded.capability,
    capability_version = excluded.capability_version, schema_ref = excluded.schema_ref,
    updated_at = now()
WHERE (items.title, items.ref, items.data) IS DISTINCT FROM
    (excluded.title, excluded.ref, excluded.data)
"""


def upsert_items(connection: Connection, line: bytes) -> None:
    """Every item of a span, the way one writes it first."""
    fields = [unescape(text) for text in line.split(b"\t")]
    trace_id, span_id, _, _, ended_ns, _, _, _, outputs, objects, _ = fields
    held = json.loads(objects)
    for output in json.loads(outputs):
        if output["name"] == "item":
            value: dict[str, Any] = held[output["hash"]]["value"]
            connection.execute(
                _UPSERT,
                {
                    **value,
                    "project": PROJECT,
                    "data": json.dumps(value["data"]),
                    "trace_id": value["trace_id"] or trace_id,
                    "span_id": value["span_id"] or span_id,
                    "ended": int(ended_ns) / 1e9,
                },
            )


def unescape(text: bytes) -> str:
    return text.replace(rb"\\", b"\\").decode() if b"\\" in text else text.decode()


def read(clickhouse: ClickHouse, session: str, take: Callable[[bytes], object]) -> None:
    """The bytes that a rebuild of a session reads."""
    table = SpanTable.of(clickhouse, "otel_traces")
    selections: list[Selection] = list(table.of_session(session, print))
    for selection in selections:
        for chunk in clickhouse.stream(*table.query(selection, [PROJECT, "webapp"])):
            take(chunk)


def selected_rows(clickhouse: ClickHouse) -> int:
    query = "SELECT value FROM system.events WHERE event = 'SelectedRows'"
    return int(clickhouse.rows(query, {}, ["value"])[0][0])


def peak(home: Path, session: str) -> float:
    """Peak resident memory of one rebuild, in MiB."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.items.rebuilding", str(home), session],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(answer.stdout) / 1024


def rebuild_and_print_peak(home: str, session: str) -> None:
    settings = Settings.from_environment(
        {"EVERRUNS_HOME": home, "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{home}/spans"}
    )
    Bench("", PostgresDatabase(settings), ClickHouseDatabase(settings)).rebuild(session)
    # Not getrusage: what it tells began before exec, in the process that started this one.
    print(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    rebuild_and_print_peak(*sys.argv[1:])
