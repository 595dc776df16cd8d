"""Span tables that are none of the exporter's own: the same items from each, and told as it is."""

from pathlib import Path

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.operations.doctor import examine
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.items import real, test_against_oracle
from everruns_pipelines_tests.items.world import World

pytestmark = pytest.mark.deploy

_COLUMNS = "Timestamp, TraceId, SpanId, SpanAttributes, Duration"
_REPEATED = "INSERT INTO traces.spans SELECT * FROM default.otel_traces"
_OWN = """
CREATE TABLE traces.spans (
    Timestamp DateTime64(9, 'Asia/Tokyo'),
    TraceId FixedString(32),
    SpanId FixedString(16),
    SpanAttributes Map(String, String),
    Duration UInt64,
    session String MATERIALIZED SpanAttributes['dreadnode.session.id'],
    run_id String MATERIALIZED SpanAttributes['dreadnode.run.id'],
    outputs String MATERIALIZED 'ours',
    state LowCardinality(String) MATERIALIZED 'ours',
    trace_id String ALIAS 'ours',
    ended_ns UInt64 ALIAS 0,
    INDEX sessions mapValues(SpanAttributes) TYPE bloom_filter
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(Timestamp)
ORDER BY (TraceId, Timestamp)
"""

# What makes each table of spans out of `otel_traces`, and what the doctor calls it.
TABLES = {
    "view": (
        ["CREATE VIEW traces.spans AS SELECT * FROM default.otel_traces"],
        "a table of engine View",
    ),
    "view of a part": (
        [
            (
                "CREATE VIEW traces.spans AS SELECT Timestamp, TraceId, SpanId,"
                " CAST(SpanAttributes, 'Map(String, String)') AS SpanAttributes, Duration"
                " FROM default.otel_traces"
            )
        ],
        "a table of engine View",
    ),
    "distributed": (
        [
            (
                "CREATE TABLE traces.spans AS default.otel_traces"
                " ENGINE = Distributed('everywhere', 'default', 'otel_traces')"
            )
        ],
        "a table of engine Distributed",
    ),
    "merge": (
        [
            (
                "CREATE TABLE traces.spans AS default.otel_traces"
                " ENGINE = Merge('default', '^otel_traces$')"
            )
        ],
        "a table of engine Merge",
    ),
    "replacing": (
        [
            (
                "CREATE TABLE traces.spans AS default.otel_traces ENGINE = ReplacingMergeTree"
                " PARTITION BY toDate(Timestamp) ORDER BY (ServiceName, TraceId, SpanId)"
            ),
            "SYSTEM STOP MERGES traces.spans",
            _REPEATED,
            _REPEATED,
            _REPEATED,
        ],
        "a table of its own kind, of engine ReplacingMergeTree",
    ),
    "own": (
        [
            _OWN,
            (f"INSERT INTO traces.spans ({_COLUMNS}) SELECT {_COLUMNS} FROM default.otel_traces"),
        ],
        "a table of its own kind",
    ),
}

_CLUSTER = """
<clickhouse>
    <tcp_port>9000</tcp_port>
    <remote_servers>
        <everywhere>
            <shard><replica><host>127.0.0.1</host><port>9000</port></replica></shard>
        </everywhere>
    </remote_servers>
</clickhouse>
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine that knows a cluster of itself: it reads this file where it is started."""
    (tmp_path / "config.xml").write_text(_CLUSTER)
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "spans"
    directory.mkdir()
    settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": f"chdb://{directory}"})
    with ClickHouseDatabase(settings).connect() as clickhouse:
        for statement in span_tables():
            clickhouse.client.command(statement)
    return directory


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sample(world: World, table: str) -> World:
    """The sample in that table, under another name, in another database, without a companion."""
    real.lay(world)
    return _moved(world, table)


def _moved(world: World, table: str) -> World:
    """The world with its spans in that table."""
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command("CREATE DATABASE traces")
        for statement in TABLES[table][0]:
            clickhouse.client.command(statement)
    settings = world.clickhouse.settings.model_copy(update={"spans_table": "traces.spans"})
    return World(world.postgres, ClickHouseDatabase(settings), world.connection)


def test_the_same_items_come_from_it_and_the_doctor_tells_what_it_is(
    sample: World, table: str
) -> None:
    before = sample.items(real.REAL_PROJECT)
    real.check(sample, before, real.rebuild_all(sample))
    again = real.rebuild_all(sample, real.TRACES, dry_run=True)
    assert (again.inserted, again.refreshed) == (0, 0)
    assert again.processed == len(sample.items(real.REAL_PROJECT))
    assert sample.rebuild_day(dry_run=True).processed == again.processed
    finding = next(one for one in examine(sample.clickhouse.settings) if one.name == "spans")
    assert finding.ok, finding.text
    assert f"traces.spans, {TABLES[table][1]}, on ClickHouse" in finding.text


def test_a_day_of_adversarial_spans_row_by_row(world: World, table: str) -> None:
    reports = test_against_oracle.lay(world, 100 + list(TABLES).index(table))
    test_against_oracle.check(_moved(world, table), reports)
