"""The job `housekeeping`: removes what nobody needs any more, and its daily schedule.

See https://docs.dagster.io/guides/build/jobs.
"""

from datetime import UTC, datetime, timedelta

import dagster as dg

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration import event_log
from everruns_pipelines.orchestration.failures import told_plainly
from everruns_pipelines.orchestration.timetable import cron
from everruns_pipelines.settings import Settings


@dg.op(name="everruns_purge_outbox", pool="postgres")
def purge_outbox(
    context: dg.OpExecutionContext, everruns_postgres: dg.ResourceParam[PostgresDatabase]
) -> None:
    """Remove outbox rows that were completed long ago."""
    from everruns_pipelines.reporting.database import prepare
    from everruns_pipelines.reporting.outbox import purge

    days = everruns_postgres.settings.outbox_keep_days
    with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
        prepare(connection)
        removed = purge(connection, timedelta(days=days))
    context.log.info(f"{removed} outbox rows removed that were completed over {days} days ago")
    context.add_output_metadata({"removed": removed, "keep_days": days})


@dg.op(name="everruns_purge_runs")
def purge_runs(
    context: dg.OpExecutionContext, everruns_postgres: dg.ResourceParam[PostgresDatabase]
) -> None:
    """Remove records of runs that ended long ago, but for those that hold the newest
    materialization or check of a partition: Dagster would forget it.
    """
    days = everruns_postgres.settings.runs_keep_days
    before = datetime.now(UTC) - timedelta(days=days)
    removed = event_log.purge_runs(context.instance, before)
    context.log.info(f"{removed} run records removed that are over {days} days old")
    context.add_output_metadata({"removed": removed, "keep_days": days})


def housekeeping(settings: Settings) -> dg.JobDefinition:
    """The job: the outbox is reporting's, and run records are ours where Dagster is."""

    @dg.job(executor_def=dg.in_process_executor)  # pyright: ignore[reportUnknownMemberType]
    def housekeeping() -> None:
        """Remove old completed outbox rows, and old run records that hold nothing newest."""
        if "reporting" in settings.parts:
            purge_outbox.alias("purge_outbox")()  # pyright: ignore[reportUnknownMemberType]
        if not settings.is_guest:
            purge_runs.alias("purge_runs")()  # pyright: ignore[reportUnknownMemberType]

    return housekeeping


def housekeeping_schedule(settings: Settings) -> dg.ScheduleDefinition:
    """Daily, when there is little else to do."""
    return dg.ScheduleDefinition(
        name="daily_housekeeping",
        job_name="housekeeping",
        cron_schedule=cron(settings.purge_at),
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Removes completed outbox rows after {settings.outbox_keep_days} days and "
        f"run records that hold nothing newest after {settings.runs_keep_days}: "
        f"{settings.purge_at} UTC.",
    )
