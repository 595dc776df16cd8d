"""What a tick of the items' sensor costs: in a large day, and at a thousand items a second.

Time is the benchmark's own: a tick for each minute of it. What a tick launches is stored before the
next one, as a run would; every failure must have been launched once.
"""

import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import md5
from typing import cast

import dagster as dg

from benchmarks.items._spans import PROJECT, add_project
from benchmarks.items._table import Row, row, show
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.items import automation
from everruns_pipelines.settings import Settings

# A day of 256 Ki spans of 4 KiB of attributes; one of 64 reports an item.
LARGE_SPANS, ATTRIBUTE_BYTES = 262_144, 4096
# Of the items that are reported, one of so many was not stored.
LOST = 1_000
PER_SECOND, MINUTES, PER_SPAN = 1_000, 20, 20
MIDNIGHT = 1_767_225_600  # 2026-01-01
TABLES = {"2024": "otel_traces.sql", "newest": "otel_traces_newest_text.sql"}


def main() -> None:
    """Measure on one table after the other, and print all of it."""
    show(one for table in TABLES for one in (large_day(table), *many_items(table)))


@dataclass
class Clock:
    """Stands for the module `time` in the sensor."""

    now: float = 0

    def time(self) -> float:
        return self.now


@dataclass
class Platform:
    postgres: PostgresDatabase
    clickhouse: ClickHouseDatabase
    connection: Connection
    cursor: str | None = None

    @cached_property
    def lost(self) -> dict[str, str]:
        """The key of the item that a trace lost."""
        return {
            _md5(f"trace {item // PER_SPAN}"): _md5(str(item))
            for item in range(0, PER_SECOND * 60 * MINUTES, LOST)
        }

    def report(self, spans: int, second: str, size: int, has_items: str, per_span: int) -> None:
        """Spans of some bytes of attributes, from midnight on, each in a trace of its own."""
        with self.clickhouse.connect() as clickhouse:
            clickhouse.client.command(f"""
                INSERT INTO otel_traces
                (Timestamp, TraceId, SpanId, ServiceName, SpanName, SpanAttributes, Duration)
                SELECT
                    toDateTime64({MIDNIGHT}, 9, 'UTC') + {second},
                    lower(hex(MD5('trace ' || toString(number)))),
                    leftPad(lower(hex(number)), 16, '0'),
                    'agent',
                    'tool:' || toString(number % 5),
                    map(
                        'dreadnode.project', '{PROJECT}',
                        'dreadnode.outputs', if({has_items}, '[' || arrayStringConcat(arrayMap(n ->
                            '{{"name":"item","label":"x","hash":"b25fdfe6ba7b0570","attributes":{{"item_type":"finding","severity":"low","status":"","dedupe_key":"' || lower(hex(MD5(toString(number * {per_span} + n)))) || '"}}}}', range({per_span})), ',') || ']', '[]'),
                        'dreadnode.objects', '{{"x":"' || hex(randomString({size // 2})) || '"}}'
                    ),
                    4000012
                FROM numbers({spans})
            """)  # noqa: E501 - our own constants; a literal is a literal

    def store(self, items: int) -> None:
        """All items but the lost ones."""
        self.connection.execute(
            """
            INSERT INTO items (
                organization_id, project_id, item_type, data, source, dedupe_key, created_at,
                updated_at
            )
            SELECT
                organization_id, %s, 'finding', '{}', 'runtime', md5(number::text), now(), now()
            FROM item_workspaces, generate_series(0, %s) AS number
            WHERE number %% %s <> 0
            """,
            [PROJECT, items - 1, LOST],
        )
        self.connection.execute("VACUUM (ANALYZE) items")

    def heal(self, traces: list[str]) -> None:
        """What the runs do that were launched for these traces."""
        self.connection.execute(
            """
            INSERT INTO items (
                organization_id, project_id, item_type, data, source, dedupe_key, created_at,
                updated_at
            )
            SELECT organization_id, %s, 'finding', '{}', 'extracted', key, now(), now()
            FROM item_workspaces, unnest(%s::text[]) AS key
            """,
            [PROJECT, [self.lost[trace] for trace in traces]],
        )

    def tick(self, now: float) -> tuple[float, list[str]]:
        """How long a tick takes, in seconds, and the traces that it launches runs for."""
        automation.time = Clock(now)
        with (
            dg.DagsterInstance.ephemeral() as instance,  # pyright: ignore[reportUnknownMemberType]
            dg.build_sensor_context(
                instance=instance,
                cursor=self.cursor,
                resources={
                    "everruns_items_postgres": self.postgres,
                    "everruns_clickhouse": self.clickhouse,
                },
            ) as context,
        ):
            started = time.perf_counter()
            result = cast("dg.SensorResult", automation.item_failures_sensor(context))
            took = time.perf_counter() - started
        self.cursor = result.cursor
        requests = result.run_requests or []
        configs = [request.run_config["ops"]["rebuild"]["config"] for request in requests]
        if result.skip_reason:
            print(result.skip_reason.skip_message, file=sys.stderr)
        return took, [trace for config in configs for trace in config["run_ids"]]


@contextmanager
def platform(table: str) -> Generator[Platform]:
    """A project, and an empty span table."""
    with tempfile.TemporaryDirectory(prefix="everruns-bench-", ignore_cleanup_errors=True) as home:
        settings = Settings.from_environment(
            {"EVERRUNS_HOME": home, "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{home}/spans"}
        )
        clickhouse = ClickHouseDatabase(settings)
        with clickhouse.connect() as opened:
            for statement in span_tables(TABLES[table]):
                opened.client.command(statement)
        with PostgresDatabase(settings).connect() as connection:
            add_project(connection)
            yield Platform(PostgresDatabase(settings), clickhouse, connection)


def large_day(table: str) -> Row:
    """A tick at the end of a day of large spans."""
    with platform(table) as made:
        step = 86_400 / LARGE_SPANS
        made.report(LARGE_SPANS, f"number * {step}", ATTRIBUTE_BYTES, "number % 64 = 0", 1)
        made.store(LARGE_SPANS)
        made.tick(MIDNIGHT + 85_000)
        took = min(made.tick(MIDNIGHT + 85_000 + 60 * number)[0] for number in range(1, 4))
    return row(f"{table}: a tick over a day of 1 GiB of attributes, s", took, 1, below=True)


def many_items(table: str) -> Generator[Row]:
    """Ticks while items are reported all the time."""
    items = PER_SECOND * 60 * MINUTES
    with platform(table) as made:
        every = PER_SPAN / PER_SECOND
        made.report(items // PER_SPAN, f"number * {every}", 600 * PER_SPAN, "true", PER_SPAN)
        made.store(items)
        ticks: list[float] = []
        launched: list[str] = []
        # What was reported last is looked at some minutes later.
        for minute in range(1, MINUTES + 5):
            took, traces = made.tick(MIDNIGHT + 60 * minute)
            made.heal(traces)
            ticks.append(took)
            launched += traces
    told = f"{table}: {PER_SECOND:,} items a second,"
    yield row(f"{told} a tick a minute, the longest, s", max(ticks), 20, below=True)
    lost = items // LOST
    yield row(f"{told} share of {lost:,} failures that were launched", len(set(launched)) / lost, 1)
    again = len(launched) - len(set(launched))
    yield row(f"{told} failures launched again", again, 0, below=True)


def _md5(text: str) -> str:
    return md5(text.encode(), usedforsecurity=False).hexdigest()
