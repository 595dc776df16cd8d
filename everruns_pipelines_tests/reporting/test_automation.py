"""The outbox sensor and reporting's schedules, with their contexts and an instance in memory."""

import json
import re
import time
from datetime import UTC, datetime, timedelta
from logging import getLogger
from typing import Any, cast

import dagster as dg
import psycopg
import pytest
from dagster import DagsterInstance, DagsterRun
from dagster._daemon.monitoring.run_monitoring import monitor_started_run

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.orchestration.timetable import BackOff
from everruns_pipelines.reporting.automation import (
    HEALING_SENSOR,
    SENSOR,
    reporting_healing_sensor,
    reporting_outbox_sensor,
)
from everruns_pipelines.reporting.backfill import BackfillRequest
from everruns_pipelines.reporting.backfill import enqueue as enqueue_missing
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.watch import find_due
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.reporting.world import drain_all

_LAUNCHED = {"dagster/sensor_name": SENSOR}


@pytest.fixture
def org(connection: Connection) -> int:
    row = connection.execute(
        "INSERT INTO organizations (public_id, name)"
        " VALUES ('org_' || repeat('0', 32), 'Northwind') RETURNING org_id"
    ).fetchone()
    assert row is not None
    return int(row[0])


def enqueue(connection: Connection, org: int, status: str, due: str, **columns: Any) -> None:
    connection.execute(
        "INSERT INTO reporting_outbox"
        " (org_id, source_type, source_id, reason, status, next_attempt_at, claimed_at, updated_at)"
        " VALUES (%s, 'event', gen_random_uuid(), 'event_projection', %s, now() + %s::interval,"
        " now() + %s::interval, now() + %s::interval)",
        [org, status, due, columns.get("claimed"), columns.get("updated", "0")],
    )


def tick(
    instance: DagsterInstance, postgres: PostgresDatabase, cursor: str | None = None
) -> dg.SensorResult:
    with dg.build_sensor_context(
        instance=instance, cursor=cursor, resources={"everruns_postgres": postgres}
    ) as context:
        return cast("dg.SensorResult", reporting_outbox_sensor(context))


def said(result: dg.SensorResult) -> str:
    assert not result.run_requests
    skip_reason = result.skip_reason
    assert skip_reason is not None
    return str(skip_reason.skip_message)


def test_nothing_is_launched_while_nothing_is_due(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "completed", "-1 day")
    enqueue(connection, org, "failed", "infinity")
    enqueue(connection, org, "processing", "-1 hour", claimed="-1 minute", updated="-1 hour")
    enqueue(connection, org, "processing", "-1 hour", updated="-14 minutes")
    reason = said(tick(instance, postgres))
    assert reason == "Nothing is due. No failed row waits for another attempt"


def test_the_skip_reason_says_when_the_next_row_is_due(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "failed", "1 hour")
    assert re.search(r"will be tried again at \d{4}-\d\d-\d\d", said(tick(instance, postgres)))


@pytest.mark.parametrize(
    ("status", "times"),
    [
        ("pending", {}),
        ("failed", {}),
        ("processing", {"claimed": "-16 minutes"}),
        ("processing", {"updated": "-16 minutes"}),
    ],
)
def test_a_due_row_launches_one_run(
    instance: DagsterInstance,
    postgres: PostgresDatabase,
    connection: Connection,
    org: int,
    status: str,
    times: dict[str, str],
) -> None:
    enqueue(connection, org, status, "-1 minute", **times)
    result = tick(instance, postgres)
    assert len(result.run_requests or []) == 1


@pytest.mark.parametrize("status", ["pending", "failed"])
@pytest.mark.parametrize("due", ["-infinity", "0044-03-15 BC"])
def test_a_row_that_is_due_since_before_pythons_calendar_launches_a_run_like_any_other(
    instance: DagsterInstance,
    postgres: PostgresDatabase,
    connection: Connection,
    org: int,
    status: str,
    due: str,
) -> None:
    enqueue(connection, org, status, "-1 minute")
    connection.execute("UPDATE reporting_outbox SET next_attempt_at = %s", [due])
    assert find_due(connection).oldest == datetime(1970, 1, 1, tzinfo=UTC)
    assert len(tick(instance, postgres).run_requests or []) == 1


def test_a_row_that_is_due_after_pythons_calendar_is_told_as_late_as_it_goes(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "failed", "1 hour")
    connection.execute("UPDATE reporting_outbox SET next_attempt_at = '12000-01-01'")
    assert "tried again at 9999-12-31 00:00:00 UTC" in said(tick(instance, postgres))


@pytest.mark.parametrize(("tags", "waits"), [(_LAUNCHED, True), ({}, False)])
def test_one_run_at_a_time_is_launched_whoever_else_projects(
    instance: DagsterInstance,
    postgres: PostgresDatabase,
    connection: Connection,
    org: int,
    tags: dict[str, str],
    waits: bool,
) -> None:
    enqueue(connection, org, "pending", "-1 minute")
    instance.add_run(_run(dg.DagsterRunStatus.STARTED, tags, {}))
    result = tick(instance, postgres)
    if waits:
        assert re.search(r"Due: 1 pending.*Run \S+ is at work", said(result))
    else:
        assert len(result.run_requests or []) == 1


def test_a_run_that_lingers_is_relieved_shortly_before_it_ends(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "pending", "-1 minute")
    lingers = {"ops": {"project": {"config": {"linger_seconds": 600}}}}
    run = instance.add_run(_run(dg.DagsterRunStatus.STARTING, _LAUNCHED, lingers))
    assert "is at work" in said(tick(instance, postgres))

    def began(seconds_ago: float) -> None:
        started = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, run.job_name)
        instance.report_dagster_event(started, run.run_id, timestamp=time.time() - seconds_ago)

    began(seconds_ago=530)
    assert "is at work" in said(tick(instance, postgres))
    began(seconds_ago=545)
    assert len(tick(instance, postgres).run_requests or []) == 1


def test_a_run_whose_process_is_gone_holds_nobody_off_and_is_ended_after_a_day(
    postgres: PostgresDatabase,
    connection: Connection,
    org: int,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the repository's own dagster.yaml."""
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", postgres_url)
    enqueue(connection, org, "pending", "-1 minute")
    with DagsterInstance.from_config(str(ROOT)) as instance:
        gone = instance.add_run(_run(dg.DagsterRunStatus.STARTED, _LAUNCHED, {})).run_id

        def aged(age: str) -> DagsterRun:
            connection.execute(
                "UPDATE runs SET create_timestamp = now() - %(age)s::interval,"
                " start_time = extract(epoch FROM now() - %(age)s::interval)",
                {"age": age},
            )
            [record] = instance.get_run_records()
            monitor_started_run(instance, cast("Any", None), record, getLogger())
            [run] = instance.get_runs()
            return run

        assert aged("59 minutes").status == dg.DagsterRunStatus.STARTED
        assert f"Run {gone} is at work" in said(tick(instance, postgres))
        assert aged("61 minutes").status == dg.DagsterRunStatus.STARTED
        assert len(tick(instance, postgres).run_requests or []) == 1
        assert aged("25 hours").status == dg.DagsterRunStatus.FAILURE


def test_it_waits_longer_after_each_run_that_fails(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "pending", "-1 minute")
    for _ in range(3):
        _fail_a_run(instance)
    assert "The last 3 runs failed: launching again at" in said(tick(instance, postgres))


def test_a_success_ends_the_waiting(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "pending", "-1 minute")
    _fail_a_run(instance)
    instance.add_run(_run(dg.DagsterRunStatus.SUCCESS, {"dagster/sensor_name": SENSOR}, {}))
    assert tick(instance, postgres).run_requests


def test_it_backs_off_while_the_database_is_away(instance: DagsterInstance) -> None:
    away = PostgresDatabase(
        Settings.from_environment(
            {"EVERRUNS_POSTGRES_URL": "postgresql://me:secret@127.0.0.1:1/nowhere"}
        )
    )
    first = tick(instance, away)
    assert "PostgreSQL cannot be used" in said(first)
    assert "secret" not in said(first)
    second = tick(instance, away, first.cursor)
    assert "The database was away 1 times in a row: trying again at" in said(second)
    assert BackOff.read(second.cursor) == BackOff.read(first.cursor)
    third = tick(instance, away, BackOff(1, time.time() - 1).write())
    assert BackOff.read(third.cursor).failures == 2


def test_it_goes_on_once_the_database_is_back(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "pending", "-1 minute")
    result = tick(instance, postgres, BackOff(5, time.time() - 1).write())
    assert result.run_requests
    assert BackOff.read(result.cursor) == BackOff()


def test_a_cursor_of_another_version_is_forgotten(
    instance: DagsterInstance, postgres: PostgresDatabase
) -> None:
    assert "Nothing is due" in said(tick(instance, postgres, "what is this?"))
    assert "Nothing is due" in said(tick(instance, postgres, '{"another": 1}'))


def test_the_run_that_is_launched_lingers_for_what_becomes_due(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection, org: int
) -> None:
    enqueue(connection, org, "pending", "-1 minute")
    [request] = tick(instance, postgres).run_requests or []
    assert request.run_config == {"ops": {"project": {"config": {"linger_seconds": 600}}}}


def heal(
    instance: DagsterInstance, postgres: PostgresDatabase, cursor: str | None = None
) -> dg.SensorResult:
    with dg.build_sensor_context(
        instance=instance, cursor=cursor, resources={"everruns_postgres": postgres}
    ) as context:
        return cast("dg.SensorResult", reporting_healing_sensor(context))


def test_what_is_missing_of_last_year_is_healed_and_then_there_is_a_pause(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection
) -> None:
    load_sample_data(connection, events=60, days=400, enqueued_share=0)
    found = heal(instance, postgres)
    [request] = found.run_requests or []
    assert request.run_config == {"ops": {"enqueue": {"config": {"limit": 10_000}}}}
    assert "The next look is at" in said(heal(instance, postgres, found.cursor))
    assert enqueue_missing(connection, BackfillRequest(limit=10_000))["enqueued"] > 0
    drain_all(connection)
    assert "A backfill has nothing to do" in said(heal(instance, postgres))


def test_sources_that_have_only_changed_wait_for_others_and_damage_does_not(
    instance: DagsterInstance, postgres: PostgresDatabase, connection: Connection
) -> None:
    prepare(connection)
    load_sample_data(connection, events=60, enqueued_share=0)
    enqueue_missing(connection, BackfillRequest(limit=10_000))
    drain_all(connection)
    connection.execute("UPDATE sessions SET title = 'x'")
    found = heal(instance, postgres)
    assert found.run_requests
    remembered = json.loads(found.cursor or "")
    assert 500 < remembered["next_changes"] - time.time() < 600
    now = json.dumps({**remembered, "next_look": 0})
    waiting = heal(instance, postgres, now)
    assert "They wait for others; the next look is at" in said(waiting)
    later = json.dumps({**json.loads(waiting.cursor or ""), "next_look": 0, "next_changes": 0})
    assert heal(instance, postgres, later).run_requests
    connection.execute("DELETE FROM fact_turn")
    assert heal(instance, postgres, now).run_requests


def test_a_look_that_takes_too_long_is_left_to_a_run(
    instance: DagsterInstance, postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(connection: Connection) -> None:
        connection.execute("SELECT pg_sleep(60)")

    monkeypatch.setattr("everruns_pipelines.reporting.backfill.look", long)
    monkeypatch.setattr("everruns_pipelines.reporting.automation.TICK_SECONDS", 4.0)
    found = heal(instance, postgres)
    assert len(found.run_requests or []) == 1

    run = instance.add_run(
        _run(dg.DagsterRunStatus.STARTED, {"dagster/sensor_name": HEALING_SENSOR}, {})
    )
    assert "is at work" in said(heal(instance, postgres, found.cursor))
    instance.report_run_failed(run)
    assert "The last 1 runs failed" in said(heal(instance, postgres, found.cursor))


def test_a_tick_is_one_query_that_reads_no_table(postgres_url: str, connection: Connection) -> None:
    from everruns_pipelines.reporting import watch

    # Small tables are read whole whatever the indexes, so that is forbidden here.
    with psycopg.connect(postgres_url, options="-c enable_seqscan=off") as planning:
        query = vars(watch)["_DUE"]
        plan = "\n".join(
            str(line) for (line,) in planning.execute(f"EXPLAIN {query}".encode(), {"most": 1000})
        )
    assert "Seq Scan" not in plan
    assert plan.count("status_next_attempt_at") >= 6


@pytest.mark.parametrize(("name", "days"), [("nightly_reporting", 2), ("weekly_reporting", 90)])
def test_a_schedule_covers_its_days_in_one_run(settings: Settings, name: str, days: int) -> None:
    defs = build_definitions(settings.model_copy(update={"reporting_start": _day("2026-01-01")}))
    schedule = defs.get_repository_def().get_schedule_def(name)
    with dg.build_schedule_context(
        scheduled_execution_time=datetime(2026, 6, 30, 23, 59, tzinfo=UTC),
        repository_def=defs.get_repository_def(),
    ) as context:
        [request] = schedule.evaluate_tick(context).run_requests or []
    assert request.tags["dagster/asset_partition_range_start"] == str(
        _day("2026-06-30") - timedelta(days=days - 1)
    )
    assert request.tags["dagster/asset_partition_range_end"] == "2026-06-30"


def test_a_schedule_does_not_reach_before_the_first_partition(settings: Settings) -> None:
    defs = build_definitions(settings.model_copy(update={"reporting_start": _day("2026-06-20")}))
    schedule = defs.get_repository_def().get_schedule_def("weekly_reporting")
    with dg.build_schedule_context(
        scheduled_execution_time=datetime(2026, 6, 30, 2, tzinfo=UTC),
        repository_def=defs.get_repository_def(),
    ) as context:
        [request] = schedule.evaluate_tick(context).run_requests or []
    assert request.tags["dagster/asset_partition_range_start"] == "2026-06-20"


def test_the_environment_says_when_schedules_run(settings: Settings) -> None:
    changed = settings.model_copy(update={"nightly_at": "23:05", "weekly_at": "Sat 01:00"})
    repository = build_definitions(changed).get_repository_def()
    assert repository.get_schedule_def("nightly_reporting").cron_schedule == "5 23 * * *"
    assert repository.get_schedule_def("weekly_reporting").cron_schedule == "0 1 * * 6"


def test_the_run_of_a_schedule_materializes_and_checks_every_fact(
    instance: DagsterInstance, settings: Settings
) -> None:
    job = build_definitions(settings).resolve_job_def("materialize_reporting")
    today = datetime.now(UTC).date()
    yesterday = today - timedelta(days=1)
    result = job.execute_in_process(
        instance=instance,
        tags={
            "dagster/asset_partition_range_start": str(yesterday),
            "dagster/asset_partition_range_end": str(today),
        },
    )
    assert result.success
    events = result.get_asset_materialization_events()
    assert len({event.asset_key for event in events}) == 6
    assert {event.partition for event in events} == {str(yesterday), str(today)}
    assert len(result.get_asset_check_evaluations()) == 18


def _day(text: str) -> Any:
    return datetime.fromisoformat(text).date()


def _run(
    status: dg.DagsterRunStatus, tags: dict[str, str], run_config: dict[str, Any]
) -> dg.DagsterRun:
    return dg.DagsterRun("project_reporting", status=status, tags=tags, run_config=run_config)


def _fail_a_run(instance: DagsterInstance) -> None:
    run = instance.add_run(_run(dg.DagsterRunStatus.STARTED, {"dagster/sensor_name": SENSOR}, {}))
    instance.report_run_failed(run)
