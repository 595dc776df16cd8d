"""What housekeeping removes, and what it leaves."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from dagster import DagsterInstance

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.operations import housekeeping as module
from everruns_pipelines.orchestration import event_log
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT

LONG_AGO = datetime.now(UTC) - timedelta(days=40)


@dg.asset
def something() -> None: ...


@dg.op
def nothing() -> None: ...


@dg.job(executor_def=dg.in_process_executor)  # pyright: ignore[reportUnknownMemberType]
def idle() -> None:
    nothing()


def keep_house(instance: DagsterInstance, settings: Settings) -> dict[str, int]:
    result = (
        build_definitions(settings)
        .get_job_def("housekeeping")
        .execute_in_process(instance=instance)
    )
    removed: dict[str, int] = {}
    for event in result.get_step_success_events():
        assert event.step_key is not None
        [output] = [
            output
            for output in result.all_events
            if output.event_type_value == "STEP_OUTPUT" and output.step_key == event.step_key
        ]
        metadata: Any = output.step_output_data.metadata
        removed[event.step_key] = metadata["removed"].value
    return removed


def test_old_runs_go_unless_they_hold_the_newest_materialization(
    instance: DagsterInstance, settings: Settings, monkeypatch: Any
) -> None:
    monkeypatch.setattr(event_log, "_AT_ONCE", 2)
    superseded = dg.materialize([something], instance=instance).run_id
    kept = {
        dg.materialize([something], instance=instance).run_id,
        instance.add_run(
            dg.DagsterRun("idle", status=dg.DagsterRunStatus.STARTED, run_id=_id(1))
        ).run_id,
    }
    old = {idle.execute_in_process(instance=instance).run_id for _ in range(5)} | {superseded}
    _age_runs(instance)
    recent = idle.execute_in_process(instance=instance).run_id
    assert keep_house(instance, settings)["purge_runs"] == len(old)
    left = {run.run_id for run in instance.get_runs()}
    assert kept | {recent} <= left
    assert not old & left
    assert keep_house(instance, settings)["purge_runs"] == 0


def test_many_nights_and_lingering_runs_leave_no_more_than_what_is_newest(
    connection: Connection, postgres_url: str, monkeypatch: Any
) -> None:
    """In PostgreSQL, as deployed: each night covers two days, a run in between touches the day."""
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", postgres_url)
    days = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-31")

    @dg.asset(partitions_def=days)
    def daily() -> None: ...

    sizes: list[int] = []
    with DagsterInstance.from_config(str(ROOT)) as instance:
        # Without a connection for every statement.
        instance.optimize_for_webserver(15_000, 3600, 20)
        for day in range(1, 13):
            for covered in (day, day + 1, day + 1):
                dg.materialize([daily], instance=instance, partition_key=f"2026-01-{covered:02}")
            event_log.purge_runs(instance, datetime.now(UTC) + timedelta(days=1))
            row = connection.execute("SELECT count(*) FROM event_logs").fetchone()
            assert row is not None
            sizes.append(row[0])
        assert len(instance.get_materialized_partitions(dg.AssetKey("daily"))) == 13
        assert len(instance.get_runs()) == 13
    per_day = sizes[1] - sizes[0]
    assert [later - earlier for earlier, later in itertools.pairwise(sizes)] == [per_day] * 11
    assert per_day < 8


def test_outbox_rows_go_when_they_were_completed_long_ago(
    instance: DagsterInstance, settings: Settings, connection: Connection
) -> None:
    connection.execute(
        "INSERT INTO organizations (public_id, name) VALUES ('org_' || repeat('0', 32), 'N')"
    )
    for status, age in (("completed", 15), ("completed", 13), ("pending", 15), ("failed", 15)):
        connection.execute(
            "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason, status,"
            " next_attempt_at, updated_at) SELECT org_id, 'event', gen_random_uuid(), 'r', %s,"
            " now() - make_interval(days => %s), now() - make_interval(days => %s)"
            " FROM organizations",
            [status, age, age],
        )
    assert keep_house(instance, settings)["purge_outbox"] == 1
    assert connection.execute("SELECT count(*) FROM reporting_outbox").fetchone() == (3,)


def test_the_environment_says_when_and_how_long_to_keep() -> None:
    settings = Settings.from_environment(
        {
            "EVERRUNS_PURGE_AT": "05:45",
            "EVERRUNS_OUTBOX_KEEP_DAYS": "3",
            "EVERRUNS_RUNS_KEEP_DAYS": "9",
        }
    )
    schedule = module.housekeeping_schedule(settings)
    assert schedule.cron_schedule == "45 5 * * *"
    assert "after 3 days" in (schedule.description or "")
    assert "after 9" in (schedule.description or "")


def _age_runs(instance: DagsterInstance) -> None:
    storage: Any = instance.run_storage
    with storage.connect() as connection:
        connection.exec_driver_sql(
            "UPDATE runs SET create_timestamp = ?", (LONG_AGO.strftime("%Y-%m-%d %H:%M:%S.%f"),)
        )


def _id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"
