"""What reporting does by itself: the sensor that drains the outbox, and the schedules of the facts.

Nothing is computed here. See https://docs.dagster.io/guides/automate/sensors and
https://docs.dagster.io/guides/automate/schedules.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import dagster as dg

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.timetable import (
    BackOff,
    day_schedules,
    hourly_schedule,
    pause_after,
)
from everruns_pipelines.reporting.jobs import DRAINS, check_reporting, project_reporting
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.reporting.watch import Due

SENSOR = "reporting_outbox_sensor"

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
# A run whose process was killed is unfinished for as long as nobody notices. Projectors do not
# disturb each other, so another beside a run that has been at work for this long is safe.
_AT_WORK = timedelta(hours=1)
# Enough to know how long to wait: by then the pause is at its longest.
_RUNS_LOOKED_AT = 8

materialize_reporting = dg.define_asset_job(  # pyright: ignore[reportUnknownMemberType]
    "materialize_reporting",
    selection=dg.AssetSelection.groups("reporting"),  # pyright: ignore[reportUnknownMemberType]
    description="Make days of every fact right, and check that they are. "
    "The schedules launch it; pick a day to launch it yourself.",
    executor_def=dg.in_process_executor,
)


@dg.sensor(  # pyright: ignore[reportUnknownMemberType]
    name=SENSOR,
    job=project_reporting,
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Launches project_reporting while rows of the outbox are due, one run at a time, "
    "and another beside one that began over an hour ago. "
    "It waits longer and longer while the database is away, or while its runs fail.",
)
def reporting_outbox_sensor(
    context: dg.SensorEvaluationContext, everruns_postgres: dg.ResourceParam[PostgresDatabase]
) -> dg.SensorResult:
    """Look what is due; launch unless somebody is at it already."""
    import psycopg

    from everruns_pipelines.reporting.watch import find_due

    now = time.time()
    back_off = BackOff.read(context.cursor)
    if now < back_off.until:
        return _skipped(
            f"The database was away {back_off.failures} times in a row: "
            f"trying again at {_clock(back_off.until)}",
            back_off,
        )
    try:
        with everruns_postgres.connect() as connection:
            due = find_due(connection)
    except Refusal as refusal:
        return _skipped(refusal.detail, back_off.again(now))
    except psycopg.Error as error:
        # The server's message alone: its details quote rows.
        message = error.diag.message_primary or type(error).__name__
        return _skipped(f"The outbox cannot be read: {message}", back_off.again(now))
    if not due.anything:
        return _skipped(f"Nothing is due. {_next(due)}")
    obstacle = _run_at_work(context.instance) or _pause_after_failures(context.instance, now)
    if obstacle:
        return _skipped(f"{_seen(due)}. {obstacle}")
    context.log.info(_seen(due))
    return dg.SensorResult([dg.RunRequest()], cursor=BackOff().write())


def reporting_schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """Nightly and weekly the days are materialized, hourly they are looked at."""
    return [
        *day_schedules(settings, "reporting", materialize_reporting),
        hourly_schedule(
            "hourly_reporting_check",
            check_reporting,
            5,
            "Looks every hour whether the facts of the last 7 days are right; repairs nothing.",
        ),
    ]


def _skipped(reason: str, back_off: BackOff | None = None) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=reason, cursor=(back_off or BackOff()).write())


def _seen(due: "Due") -> str:
    counts = f"Due: {_count(due.pending)} pending, {_count(due.failed)} to retry, {due.lost} lost"
    return counts if due.oldest is None else f"{counts}; the oldest since {due.oldest:%F %T} UTC"


def _next(due: "Due") -> str:
    if due.next_retry is None:
        return "No failed row waits for another attempt"
    return f"The next failed row will be tried again at {due.next_retry:%F %T} UTC"


def _count(number: int) -> str:
    from everruns_pipelines.reporting.watch import MOST_COUNTED

    return f"at least {number}" if number == MOST_COUNTED else str(number)


def _run_at_work(instance: dg.DagsterInstance) -> str | None:
    """Who projects all organizations already. Runs of one organization do not stand in the way."""
    since = datetime.now(UTC) - _AT_WORK
    runs = instance.get_runs(
        dg.RunsFilter(tags=DRAINS, statuses=_UNFINISHED, created_after=since), limit=100
    )
    for run in runs:
        ops = cast("dict[str, Any]", run.run_config.get("ops", {}))
        if ops.get("project", {}).get("config", {}).get("org_id") is None:
            return f"Run {run.run_id} of {run.job_name} is at work"
    return None


def _pause_after_failures(instance: dg.DagsterInstance, now: float) -> str | None:
    """Why to wait, if the last runs that this sensor launched have failed."""
    records = instance.get_run_records(
        dg.RunsFilter(tags={"dagster/sensor_name": SENSOR}), limit=_RUNS_LOOKED_AT
    )
    failures = 0
    for record in records:
        if record.dagster_run.status != dg.DagsterRunStatus.FAILURE:
            break
        failures += 1
    if not failures:
        return None
    until = (records[0].end_time or now) + pause_after(failures)
    if now >= until:
        return None
    return f"The last {failures} runs failed: launching again at {_clock(until)}"


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%F %T} UTC"
