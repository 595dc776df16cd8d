"""The sensor that heals lost POSTs, and the items' schedules."""

import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, cast

import dagster as dg
import pytest
from dagster import DagsterInstance
from pydantic import SecretStr

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.items import automation, unstored
from everruns_pipelines.items.automation import item_failures_sensor
from everruns_pipelines.items.span_table import Position
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.items.world import (
    ORGANIZATION,
    PROJECT,
    WORKSPACE,
    Span,
    World,
    envelope,
    key,
    name_id,
)


def ago(**time: float) -> datetime:
    return datetime.now(UTC) - timedelta(**time)


def span(name: str, *, start: datetime | None = None, **fields: Any) -> Span:
    """A span that reported an item of its name, five minutes ago."""
    return Span([envelope(name)], name=name, trace=name, start=start or ago(minutes=5), **fields)


def tick(
    world: World,
    cursor: str | None = None,
    clickhouse: ClickHouseDatabase | None = None,
    runs: DagsterInstance | None = None,
) -> dg.SensorResult:
    with dg.build_sensor_context(
        instance=runs or _without_runs(),
        cursor=cursor,
        resources={
            "everruns_items_postgres": world.postgres,
            "everruns_clickhouse": clickhouse or world.clickhouse,
        },
    ) as context:
        return cast("dg.SensorResult", item_failures_sensor(context))


@cache
def _without_runs() -> DagsterInstance:
    return DagsterInstance.ephemeral()  # pyright: ignore[reportUnknownMemberType]


def configs(result: dg.SensorResult) -> list[dict[str, Any]]:
    return [request.run_config["ops"]["rebuild"]["config"] for request in result.run_requests or []]


def traces(result: dg.SensorResult) -> set[str]:
    return {run for config in configs(result) for run in config["run_ids"]}


def said(result: dg.SensorResult) -> str:
    assert not result.run_requests
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def test_envelopes_without_an_item_are_rebuilt_in_one_run(world: World) -> None:
    world.add(span("one"), span("two"), span("stored"))
    world.post("stored")
    result = tick(world)
    [config] = configs(result)
    assert (config["organization"], config["workspace"], config["project"]) == (
        str(ORGANIZATION),
        str(WORKSPACE),
        str(PROJECT),
    )
    assert traces(result) == {name_id("one").hex, name_id("two").hex}


def test_the_run_that_is_launched_heals_them(world: World, instance: DagsterInstance) -> None:
    world.add(span("one"))
    [config] = configs(tick(world))
    job = build_definitions(world.postgres.settings).get_job_def("rebuild_items")
    done = job.execute_in_process(
        {"ops": {"rebuild": {"config": config}}}, instance=instance
    ).output_for_node("rebuild")
    assert done["inserted"] == 1
    assert "0 lack their row" in said(tick(world))


def test_each_failure_is_launched_once(world: World) -> None:
    world.add(span("one"))
    first = tick(world)
    assert traces(first) == {name_id("one").hex}
    world.add(span("two"))
    second = tick(world, first.cursor)
    assert traces(second) == {name_id("two").hex}
    assert "2 lack their row, and were launched before" in said(tick(world, second.cursor))


def test_a_rejected_envelope_is_no_failure(world: World) -> None:
    world.add(Span([envelope("one", data="no object")], trace="one", start=ago(minutes=5)))
    assert len(configs(tick(world))) == 1
    world.rebuild()
    assert "0 lack their row" in said(tick(world))


def test_projects_get_runs_of_their_own(world: World) -> None:
    world.add_project("other", name_id("other"))
    world.add(
        span("one", project=str(PROJECT)[:18] + str(PROJECT)[18:].upper()),
        span("two", project="other"),
        span("three", project="unknown"),
    )
    assert [config["project"] for config in configs(tick(world))] == sorted(
        [str(PROJECT), str(name_id("other"))]
    )


def test_an_odd_project_name_does_not_stop_the_sensor(world: World) -> None:
    odd = ["a\u2028b", "a\u0085", "a\tb", "a\nb", "\\N", "'\""]
    world.add(span("one"), *(span(project, project=project) for project in odd))
    assert traces(tick(world)) == {name_id("one").hex}


def test_many_traces_are_split_into_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automation, "_TRACES_PER_RUN", 2)
    world.add(*(span(f"number {number}") for number in range(5)))
    result = tick(world)
    assert [len(config["run_ids"]) for config in configs(result)] == [2, 2, 1]
    assert len(traces(result)) == 5


def test_what_is_too_much_for_one_tick_is_left_to_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unstored, "MOST_REPORTED", 3)
    names = [f"number {number}" for number in range(6)]
    world.add(*(span(name, start=ago(minutes=30 - number)) for number, name in enumerate(names)))
    found = set[str]()
    cursor: str | None = None
    for _ in names:
        result = tick(world, cursor)
        assert not found & traces(result)
        found |= traces(result)
        cursor = result.cursor
    assert found == {name_id(name).hex for name in names}


def test_thousands_of_one_instant_are_all_found_and_stored_ones_take_no_others_place(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unstored, "MOST_REPORTED", 3_400)
    monkeypatch.setattr(unstored, "MOST_UNSTORED", 800)
    then = ago(minutes=5)
    spans = [
        Span([envelope(f"{n} {m}") for m in range(100)], name=f"{n}", trace=f"{n}", start=then)
        for n in range(60)
    ]
    world.add(*spans)
    stored = {key(f"{n} {m}") for n in range(60) for m in range(0, 100, 2)}
    world.connection.execute(
        "INSERT INTO items (organization_id, project_id, item_type, data, source, dedupe_key,"
        " created_at, updated_at) SELECT %s, %s, 'finding', '{}', 'runtime', name, now(), now()"
        " FROM unnest(%s::text[]) AS name",
        [ORGANIZATION, PROJECT, list(stored)],
    )
    found: list[str] = []
    until = Position(int(ago(minutes=1).timestamp()) * 1_000_000_000)
    after = Position(int(ago(hours=1).timestamp()) * 1_000_000_000)
    with unstored.Watch.opened(world.postgres, world.clickhouse, 60) as watch:
        while after < until:
            look = watch.look(after, until)
            found += [one.position.dedupe_key for one in look.unstored]
            after = look.reached
    assert len(found) == len(set(found)) == 3_000
    assert not stored & set(found)


def test_items_are_given_time_to_arrive(world: World) -> None:
    world.add(span("one", start=ago(seconds=30)))
    assert "0 items reported" in said(tick(world))


def test_what_comes_in_late_by_hours_is_found_by_looks_at_the_last_days(
    world: World, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automation, "_THIRD_LOOK", 3 * 3600)
    world.add(span("first"))
    cursor = tick(world).cursor
    names = {f"{hours} hours late": hours for hours in (1.5, 2.5)}
    world.add(*(span(name, start=ago(hours=hours)) for name, hours in names.items()))
    healing = instance.add_run(
        dg.DagsterRun(
            "rebuild_items",
            status=dg.DagsterRunStatus.STARTED,
            tags={"dagster/sensor_name": automation.SENSOR},
        )
    )
    assert "1 lack their row" in said(tick(world, cursor, runs=instance))
    instance.report_run_canceled(healing)

    job = build_definitions(world.postgres.settings).get_job_def("rebuild_items")
    for _ in range(3):
        result = tick(world, cursor, runs=instance)
        for config in configs(result):
            job.execute_in_process({"ops": {"rebuild": {"config": config}}}, instance=instance)
        cursor = result.cursor
    assert world.items().keys() == {key(name) for name in names}


def test_of_many_ticks_each_launches_what_no_other_did(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of an hour in which nothing is healed, with times between whole seconds."""
    monkeypatch.setattr(automation, "_THIRD_LOOK", 0)
    names = [f"number {number}" for number in range(36)]
    begin = ago(minutes=45)
    world.add(
        *(
            span(name, start=begin + timedelta(seconds=20.3 * number))
            for number, name in enumerate(names)
        )
    )
    launched: list[str] = []
    cursor: str | None = None
    for number in range(9):
        now = begin.timestamp() + 120.7 * number
        monkeypatch.setattr("everruns_pipelines.items.automation.time", _Clock(now))
        result = tick(world, cursor)
        launched += traces(result)
        cursor = result.cursor
    assert sorted(launched) == sorted(name_id(name).hex for name in names)


@dataclass
class _Clock:
    now: float

    def time(self) -> float:
        return self.now


def test_a_server_that_accepts_and_never_answers_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automation, "TICK_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"clickhouse://me:secret@127.0.0.1:{silent.getsockname()[1]}/default"
        settings = world.clickhouse.settings.model_copy(update={"clickhouse_dsn": SecretStr(dsn)})
        result = tick(world, clickhouse=ClickHouseDatabase(settings))
    assert "ClickHouse failed" in said(result)
    assert json.loads(result.cursor or "")["back_off"]["failures"] == 1


def test_pending_spans_and_other_outputs_are_passed_over(world: World) -> None:
    world.add(
        span("one", attributes={"logfire.span_type": "pending_span"}),
        Span([1], name="two", start=ago(minutes=5)),
        span("three", attributes={"dreadnode.outputs": '[{"name": "item"'}),
    )
    assert "0 items reported" in said(tick(world))


def test_without_spans_the_embedded_engine_is_not_even_opened(world: World, home: Any) -> None:
    settings = Settings.from_environment({"EVERRUNS_HOME": str(home / "elsewhere")})
    result = tick(world, clickhouse=ClickHouseDatabase(settings))
    assert said(result) == "No spans are stored yet"


def test_it_backs_off_while_a_database_is_away(world: World) -> None:
    away = PostgresDatabase(
        Settings.from_environment(
            {"EVERRUNS_POSTGRES_URL": "postgresql://me:secret@127.0.0.1:1/nowhere"}
        )
    )
    world.add(span("one"))
    blind = World(away, world.clickhouse, world.connection)
    first = tick(blind)
    assert "PostgreSQL cannot be used" in said(first)
    assert "trying again at" in said(tick(blind, first.cursor))
    memory = json.loads(first.cursor or "")
    memory["back_off"]["until"] = 0
    assert traces(tick(world, json.dumps(memory))) == {name_id("one").hex}


def test_it_waits_longer_after_each_run_that_fails(world: World, instance: DagsterInstance) -> None:
    world.add(span("one"))
    for _ in range(2):
        instance.add_run(
            dg.DagsterRun(
                "rebuild_items",
                status=dg.DagsterRunStatus.FAILURE,
                tags={"dagster/sensor_name": automation.SENSOR},
            )
        )
    waits = tick(world, runs=instance)
    assert "The last 2 runs failed: launching again at" in said(waits)
    assert traces(tick(world, waits.cursor)) == {name_id("one").hex}


def test_a_missing_span_table_is_told(world: World) -> None:
    settings = world.clickhouse.settings.model_copy(update={"spans_table": "elsewhere"})
    assert "no such table" in said(tick(world, clickhouse=ClickHouseDatabase(settings)))


def test_a_busy_engine_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automation, "TICK_SECONDS", 1.0)
    with world.clickhouse.connect():
        assert "another run is reading the embedded ClickHouse" in said(tick(world))


@pytest.mark.parametrize(("name", "days"), [("nightly_items", 2), ("weekly_items", 90)])
def test_a_schedule_covers_its_days_in_one_run(settings: Settings, name: str, days: int) -> None:
    repository = build_definitions(settings).get_repository_def()
    with dg.build_schedule_context(
        scheduled_execution_time=datetime(2026, 6, 30, 0, 30, tzinfo=UTC),
        repository_def=repository,
    ) as context:
        [request] = repository.get_schedule_def(name).evaluate_tick(context).run_requests or []
    first = datetime(2026, 6, 30, tzinfo=UTC).date() - timedelta(days=days - 1)
    assert request.tags["dagster/asset_partition_range_start"] == str(first)
    assert request.tags["dagster/asset_partition_range_end"] == "2026-06-30"
