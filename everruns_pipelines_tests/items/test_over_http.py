"""Rebuilds from a server over HTTP, which refuses, stalls, or cuts its answer in the middle."""

from collections.abc import Iterator

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure
from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.databases.http_engine import Fault, HttpEngine, serving
from everruns_pipelines_tests.items.world import Span, World, envelope, key


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpEngine]:
    monkeypatch.setattr("everruns_pipelines.databases.clickhouse.PAUSES", (0.0, 0.0))
    with serving(world.clickhouse) as server:
        yield server


def _over_http(world: World, server: HttpEngine, **environment: str) -> World:
    settings = world.clickhouse.settings.model_dump(by_alias=True, exclude_none=True)
    settings |= {"EVERRUNS_CLICKHOUSE_DSN": server.dsn, **environment}
    remote = ClickHouseDatabase(Settings.model_validate(settings))
    return World(world.postgres, remote, world.connection)


def test_a_rebuild_over_http_is_the_same_rebuild(world: World, server: HttpEngine) -> None:
    world.add(
        Span([envelope("one", data={"text": "it's\ta \\ 'tab'\n\x08\x0c\r\x0b \u2028 😀"})]),
        Span([envelope("run")], name="run", trace="run", session=None, run="run 'x'"),
    )
    remote = _over_http(world, server)
    assert (
        remote.rebuild(run_ids=("run 'x'", *(str(number) for number in range(2000)))).inserted == 2
    )
    before = world.items()
    assert world.rebuild(run_ids=("run 'x'",)).unchanged == 2
    assert world.items() == before


@pytest.mark.parametrize(
    "fault", ["hang up", "cut", "error", "error in the middle", "no length", "stall"]
)
def test_one_fault_is_survived(
    world: World, server: HttpEngine, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add(Span([envelope("one"), envelope("two")], name="a"), Span([envelope("three")]))
    remote = _over_http(world, server)
    if fault == "stall":
        monkeypatch.setattr("everruns_pipelines.databases.clickhouse.STALL_TIMEOUT", 3)
    server.faults = [fault]
    assert remote.rebuild().inserted == 3
    assert server.faults == []


@pytest.mark.parametrize(
    ("faulty", "fault"),
    [
        ("currentDatabase", "no length"),
        ("system.columns", "error in the middle"),
        ("system.data_skipping_indices", "no length"),
        ("DISTINCT TraceId", "error in the middle"),
        ("DISTINCT TraceId", "no length"),
    ],
)
def test_one_fault_in_what_is_asked_before_the_spans_is_survived(
    world: World, server: HttpEngine, faulty: str, fault: Fault
) -> None:
    world.add(*(Span([envelope(str(n))], name=str(n), trace=str(n)) for n in range(6)))
    remote = _over_http(world, server)
    server.faulty = faulty
    server.faults = [fault]
    assert remote.rebuild().inserted == 6
    assert server.faults == []


def test_faults_without_end_fail_the_run_and_write_nothing(
    world: World, server: HttpEngine
) -> None:
    world.add(Span([envelope("one"), envelope("two")]))
    remote = _over_http(world, server)
    server.faults = ["cut", "error in the middle", "hang up", "hang up", "hang up", "hang up"]
    with pytest.raises(ClickHouseFailure) as raised:
        remote.rebuild()
    assert "secret" not in str(raised.value)
    assert "title of one" not in str(raised.value)
    assert world.items() == {}


def test_a_server_that_refuses_is_asked_again_and_then_the_run_fails(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everruns_pipelines.databases.clickhouse.PAUSES", (0.0, 0.0))
    with serving(world.clickhouse) as server:
        gone = _over_http(world, server)
    with pytest.raises(ClickHouseFailure):
        gone.rebuild()
    assert len(gone.log) == 2
    assert all("Trying again" in message for message in gone.log)


def test_an_unknown_table_is_refused(world: World, server: HttpEngine) -> None:
    remote = _over_http(world, server, EVERRUNS_SPANS_TABLE="nowhere.spans")
    with pytest.raises(Refusal, match="EVERRUNS_SPANS_TABLE") as raised:
        remote.rebuild()
    assert raised.value.code == "incompatible_schema"


def test_a_table_that_lacks_columns_is_refused(world: World) -> None:
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command(
            "CREATE TABLE IF NOT EXISTS thin (TraceId String) ENGINE = Memory"
        )
    settings = world.clickhouse.settings.model_copy(update={"spans_table": "thin"})
    thin = World(world.postgres, ClickHouseDatabase(settings), world.connection)
    with pytest.raises(Refusal, match="lacks Duration, SpanAttributes, SpanId, Timestamp"):
        thin.rebuild()


def test_a_qualified_table_without_its_companion_is_read_too(world: World) -> None:
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command("CREATE DATABASE IF NOT EXISTS elsewhere")
        clickhouse.client.command("DROP TABLE IF EXISTS elsewhere.spans")
        clickhouse.client.command("CREATE TABLE elsewhere.spans AS otel_traces")
    world.add(Span([envelope("one")]))
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command("INSERT INTO elsewhere.spans SELECT * FROM otel_traces")
    settings = world.clickhouse.settings.model_copy(update={"spans_table": "elsewhere.spans"})
    moved = World(world.postgres, ClickHouseDatabase(settings), world.connection)
    assert moved.rebuild().inserted == 1
    assert world.items().keys() == {key("one")}
