"""Every way to pick spans leans on an index or a partition, as the rows that are read show."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouse
from everruns_pipelines.items import span_table
from everruns_pipelines.items.span_table import Selection, SpanTable, of_day
from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.world import (
    DAY,
    OTHER_SESSION,
    PROJECT,
    RUN,
    SESSION,
    Span,
    World,
    envelope,
)

_DAYS = 4
HOUR = timedelta(hours=1)

_WAYS: dict[str, Callable[[SpanTable], Iterable[Selection]]] = {
    "session": lambda table: table.of_session(SESSION, print),
    "run": lambda table: table.of_runs([RUN]),
    "trace": lambda table: table.of_runs([Span().trace_id]),
    "day": lambda table: [of_day(DAY)],
}


@pytest.mark.parametrize(
    ("generation", "noise", "bound"),
    [
        ("otel_traces.sql", 240_000, 0.25),
        ("otel_traces_newest_text.sql", 240_000, 0.25),
        *(pytest.param(one, 1_000_000, 0.03, marks=pytest.mark.deploy) for one in GENERATIONS),
    ],
)
def test_a_selection_reads_a_part_of_the_table(
    world: World, generation: str, noise: int, bound: float
) -> None:
    world.add(Span([envelope("one")]))
    with world.clickhouse.connect() as clickhouse:
        add_noise(clickhouse, noise)
        read = shares_read(clickhouse)
    if generation != "otel_traces_json.sql":
        assert max(read["session"], read["run"], read["trace"]) < bound
    assert read["day"] < 1.5 / _DAYS


def add_noise(clickhouse: ClickHouse, spans: int) -> None:
    """Spans of other sessions over some days, in parts that are merged."""
    kind = SpanTable.of(clickhouse, "otel_traces").columns["SpanAttributes"]
    clickhouse.client.command(
        "INSERT INTO otel_traces (Timestamp, TraceId, SpanId, ServiceName, SpanName,"
        " SpanAttributes) SELECT"
        f" toDateTime64('{DAY} 00:00:00', 9, 'UTC') + number * {_DAYS * 86400} / {spans},"
        " lower(hex(MD5(toString(intDiv(number, 50))))), toString(number), 'agent',"
        " 'tool:' || toString(number % 5),"
        f" CAST(map('dreadnode.project', '{PROJECT}',"
        " 'dreadnode.session.id', 's' || toString(intDiv(number, 500)),"
        f" 'dreadnode.run.id', 'r' || toString(intDiv(number, 100))), '{kind}')"
        f" FROM numbers({spans})"
    )
    clickhouse.client.command("OPTIMIZE TABLE otel_traces FINAL")


def shares_read(clickhouse: ClickHouse) -> dict[str, float]:
    """What each way to pick the one span that carries an item reads of the table."""
    table = SpanTable.of(clickhouse, "otel_traces")
    return {name: _rows_read(clickhouse, table, way) / table.held for name, way in _WAYS.items()}


def test_a_companion_that_knows_traces_in_part_loses_no_span(world: World) -> None:
    first = datetime(2026, 1, 1, tzinfo=UTC)
    hours = {"at the start": (0, 5), "in the middle": (40, 45), "at the end": (95, 90)}
    holes = {f"{where} {n}": times for where, times in hours.items() for n in range(10)}
    world.add(
        *(
            Span([envelope(one)], name=one, trace=trace, start=first + hour * HOUR)
            for trace, times in holes.items()
            for hour in times
            for one in [f"{trace} {hour}"]
        )
    )
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command(
            "INSERT INTO otel_traces (Timestamp, TraceId, SpanId)"
            " SELECT toDateTime64('2026-01-01 01:00:00', 9, 'UTC') + number, lower(hex(MD5("
            " toString(intDiv(number, 50))))), toString(number) FROM numbers(300000)"
        )
        lost = ", ".join(f"'{Span(trace=trace).trace_id}'" for trace in holes)
        clickhouse.client.command(
            "ALTER TABLE otel_traces_trace_id_ts DELETE"
            f" WHERE TraceId IN ({lost}) SETTINGS mutations_sync = 1"
        )
        for trace, (_, hour) in holes.items():
            known = f"toDateTime('{first + hour * HOUR:%F %T}', 'UTC')"
            clickhouse.client.command(
                "INSERT INTO otel_traces_trace_id_ts"
                f" SELECT '{Span(trace=trace).trace_id}', {known}, {known}"
            )
        # It knows all the time that the spans take.
        clickhouse.client.command(
            "INSERT INTO otel_traces_trace_id_ts"
            " SELECT 'another', min(Timestamp), max(Timestamp) FROM otel_traces"
        )
    traces = tuple(Span(trace=trace).trace_id for trace in holes)
    assert world.rebuild(None, run_ids=traces, dry_run=True).processed == 2 * len(holes)
    assert world.rebuild().processed == 2 * len(holes)


def test_servers_of_some_years_ago_know_every_function_we_ask_for(world: World) -> None:
    module = Path(span_table.__file__)
    asked = module.read_text() + module.with_name("spans.sql").read_text()
    names = set(re.findall(r"\w+(?=\()", asked))
    with world.clickhouse.connect() as clickhouse:
        query = (
            "SELECT name, introduced_in FROM system.functions WHERE name IN {names:Array(String)}"
        )
        known = dict(clickhouse.rows(query, {"names": sorted(names)}, ["name", "introduced_in"]))
    assert {"isValidJSON", "toUnixTimestamp64Nano"} <= known.keys()
    new = {name: since for name, since in known.items() if int(since.split(".")[0] or 0) > 22}
    assert new == {}


def _rows_read(
    clickhouse: ClickHouse, table: SpanTable, way: Callable[[SpanTable], Iterable[Selection]]
) -> int:
    before = _selected(clickhouse)
    found = b"".join(
        chunk
        for selection in list(way(table))
        for chunk in clickhouse.stream(*table.query(selection, [str(PROJECT)]))
    )
    assert found.count(b"\n") == 1
    return _selected(clickhouse) - before


def _selected(clickhouse: ClickHouse) -> int:
    query = "SELECT value FROM system.events WHERE event = 'SelectedRows'"
    return int(clickhouse.rows(query, {}, ["value"])[0][0])


_REBUILD = """
import sys
from pathlib import Path
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.items.rebuild import rebuild
from everruns_pipelines.items.scope import RebuildRequest
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.settings import Settings

settings = Settings.from_environment()
request = RebuildRequest("acme", "red", "webapp", sys.argv[1])
done = rebuild(PostgresDatabase(settings), ClickHouseDatabase(settings), request, lambda _: None)
print(done.processed)
print(Path("/proc/self/status").read_text())
"""


@pytest.mark.deploy
def test_spans_of_megabytes_take_no_more_memory_than_is_promised(world: World) -> None:
    large = {"text": "yx" * 1_900_000}
    for tens in range(5):
        names = [f"{tens}{ones}" for ones in range(10)]
        world.add(*(Span([envelope(name, data=large)], name=name) for name in names))
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command("OPTIMIZE TABLE otel_traces FINAL")
    _, empty = _processed_and_peak(world, OTHER_SESSION)
    processed, peak = _processed_and_peak(world, SESSION)
    assert processed == 50
    assert peak - empty < 256


def _processed_and_peak(world: World, session: str) -> tuple[int, float]:
    """What a rebuild in a process of its own processes, and its peak memory in MiB."""
    settings = world.clickhouse.settings
    assert settings.postgres_url is not None
    assert settings.clickhouse_dsn is not None
    told = subprocess.run(
        [sys.executable, "-c", _REBUILD, session],
        check=True,
        capture_output=True,
        text=True,
        env={
            "EVERRUNS_POSTGRES_URL": settings.postgres_url.get_secret_value(),
            "EVERRUNS_CLICKHOUSE_DSN": settings.clickhouse_dsn.get_secret_value(),
        },
    ).stdout
    [(processed, peak)] = re.findall(r"\A(\d+)\n(?s:.*)VmHWM:\s+(\d+) kB", told)
    return int(processed), int(peak) / 1024
