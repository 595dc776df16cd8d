"""Whether Dagster's storage stays bounded: 400 nights and as many days of runs that linger and
heal, a day's housekeeping after each.

One run of each kind is real, on a real deployment. The others are copies of it with dates of their
own: what housekeeping reads of a run are columns, not the texts of events. A tenth of a day's runs
is copied: so what stays for good, the newest of each partition, weighs ten times as much. Its bytes
are those of indexes, of which a row that stays keeps a page.
"""

import time
from collections.abc import Generator, Mapping
from contextlib import redirect_stderr
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from statistics import median

from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from psycopg import sql

from benchmarks.operations._platform import Storage, sample, storage_of
from benchmarks.operations._table import Row, show
from everruns_pipelines.client import Deployment
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.orchestration.event_log import purge_runs
from everruns_pipelines.orchestration.partitions import day_range_tags
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import live_deployment, until
from everruns_pipelines_tests.reporting.world import drain_all

NIGHTS = 400
KEPT = timedelta(days=30)
# In a day of 100 rows/s: runs of the outbox sensor, which relieve each other every 540 s; healing,
# where some session changes all the time and waits as long; what is done every hour; one night.
RUNS = {
    "project_reporting": 160,
    "backfill_reporting": 160,
    "check_reporting": 24,
    "check_items": 24,
    "measure_health": 24,
    "materialize_reporting": 1,
}
_IDLE = ("check_reporting", "check_items", "measure_health", "materialize_reporting")
_LINGER_SECONDS = 30
_SETTLED = 100


def main() -> None:
    """Measure, and print beside the targets."""
    show(f"{NIGHTS} nights of housekeeping", housekeeping())


def housekeeping() -> Generator[Row]:
    with sample(events=400) as (settings, home), storage_of(settings) as (instance, storage):
        runs = _run_each_once(settings, home, instance)
        yield from _bytes_of_a_day(storage, runs)
        seconds: list[float] = []
        sizes: list[tuple[int, int]] = []
        for night in range(NIGHTS):
            day = datetime.now(UTC) - timedelta(days=NIGHTS - night)
            for job, run in runs.items():
                _copy(storage, run, max(1, RUNS[job] // 10), day)
            began = time.perf_counter()
            purge_runs(instance, day - KEPT)
            seconds.append(time.perf_counter() - began)
            storage.execute("VACUUM event_logs, asset_event_tags, runs, run_tags")
            [size] = storage.execute(
                "SELECT count(*), pg_total_relation_size('event_logs') FROM event_logs"
            ).fetchall()
            sizes.append((size[0], size[1]))
    (rows, size), (rows_then, size_then) = sizes[_SETTLED], sizes[-1]
    nights = f"night {_SETTLED} to night {NIGHTS}"
    yield (
        f"rows of the event log, {nights}",
        f"{rows:,} to {rows_then:,}: x {rows_then / rows:.2f}",
        "flat",
    )
    yield (
        "  its bytes",
        f"{size / 1e6:.0f} to {size_then / 1e6:.0f} MB: x {size_then / size:.2f}",
        "flat",
    )
    told = f"{median(seconds[-30:]):.2f} s, at most {max(seconds):.2f} s"
    yield "housekeeping of a day, in the last month", told, "< 10 s"


def _run_each_once(settings: Settings, home: Path, instance: DagsterInstance) -> dict[str, str]:
    """The run of each job on a real deployment, with as much to do as on a usual day."""
    environment = {
        "EVERRUNS_HOME": str(settings.home),
        "EVERRUNS_LINGER_SECONDS": str(_LINGER_SECONDS),
    }
    with PostgresDatabase(settings).connect() as connection:
        enqueue(connection, BackfillRequest(limit=10_000))
        drain_all(connection)
        with live_deployment(home, environment) as live:
            for fact in FACTS:
                connection.execute(
                    sql.SQL(_LOST).format(sql.Identifier(fact.table)), [timedelta(days=2)]
                )
            connection.execute("UPDATE reporting_outbox SET status = 'pending'")
            deployment = Deployment(live.url)
            runs = {"project_reporting": _launched_by_the_sensor(instance)}
            connection.execute(_CHANGED_SESSIONS)
            for job in ("backfill_reporting", "check_reporting", "check_items", "measure_health"):
                runs[job] = deployment.launch(job, {})
                deployment.follow(runs[job])
    with redirect_stderr(StringIO()):
        night = (
            build_definitions(settings)
            .resolve_job_def("materialize_reporting")
            .execute_in_process(
                tags=day_range_tags(settings, datetime.now(UTC).date(), 2), instance=instance
            )
        )
    return {**runs, "materialize_reporting": night.run_id}


def _launched_by_the_sensor(instance: DagsterInstance) -> str:
    """The first run of the outbox sensor, once it has ended."""
    ended = RunsFilter(job_name="project_reporting", statuses=[DagsterRunStatus.SUCCESS])
    until(lambda: bool(instance.run_storage.get_run_ids(ended)), "a run of the sensor has ended")
    return instance.run_storage.get_run_ids(ended)[-1]


# So that what is due makes all facts of a day: the newest session of the sample is of yesterday.
_LOST = "DELETE FROM {} WHERE created_at > now() - %s"

# Nobody has enqueued them.
_CHANGED_SESSIONS = """
UPDATE sessions SET status = status
WHERE id IN (SELECT id FROM sessions ORDER BY created_at DESC LIMIT 5)
"""


def _bytes_of_a_day(storage: Storage, runs: Mapping[str, str]) -> Generator[Row]:
    [(whole, rows)] = storage.execute(
        "SELECT pg_total_relation_size('event_logs'), sum(pg_column_size(event_logs))"
        " FROM event_logs"
    ).fetchall()
    bytes_of = {
        job: storage.execute(
            "SELECT sum(pg_column_size(event_logs)) FROM event_logs WHERE run_id = %s", [run]
        ).fetchall()[0][0]
        * (whole / rows)
        for job, run in runs.items()
    }
    a_day = {job: bytes_of[job] * number for job, number in RUNS.items()}
    yield (
        f"event log, a day of {sum(RUNS.values())} runs",
        f"{sum(a_day.values()) / 1e6:.1f} MB",
        "< 20 MB",
    )
    for job, number in RUNS.items():
        yield f"  {number} of {job}", f"{a_day[job] / 1e6:.1f} MB", "reported"
    idle = sum(a_day[job] for job in _IDLE)
    yield "  idle", f"{idle / 1e6:.1f} MB", "< 20 MB"


def _copy(storage: Storage, run: str, number: int, day: datetime) -> None:
    """Copies of a run, with all that the storage keeps of it, as of that day."""
    with storage.transaction():
        storage.execute(
            "CREATE TEMP TABLE copies ON COMMIT DROP AS"
            " SELECT gen_random_uuid()::text AS run_id FROM generate_series(1, %s)",
            [number],
        )
        for statement in _COPY.split(";"):
            storage.execute(
                statement.encode(), {"run": run, "day": day.replace(tzinfo=None)}, prepare=False
            )


_COPY = """
INSERT INTO runs (run_id, snapshot_id, pipeline_name, mode, status, run_body, create_timestamp,
    update_timestamp, start_time, end_time)
SELECT copies.run_id, snapshot_id, pipeline_name, mode, 'SUCCESS', run_body, %(day)s, %(day)s,
    start_time, end_time
FROM runs, copies WHERE runs.run_id = %(run)s;
INSERT INTO run_tags (run_id, key, value)
SELECT copies.run_id, key, value FROM run_tags, copies WHERE run_tags.run_id = %(run)s;
INSERT INTO event_logs (run_id, event, dagster_event_type, timestamp, step_key, asset_key,
    partition)
SELECT copies.run_id, event, dagster_event_type, %(day)s, step_key, asset_key,
    (partition::date + (%(day)s::date - current_date))::text
FROM event_logs, copies WHERE event_logs.run_id = %(run)s ORDER BY copies.run_id, event_logs.id;
INSERT INTO asset_check_executions (asset_key, check_name, partition, run_id, execution_status,
    evaluation_event, evaluation_event_timestamp, evaluation_event_storage_id, create_timestamp)
SELECT asset_key, check_name, partition, copies.run_id, execution_status, evaluation_event, %(day)s,
    (SELECT max(id) FROM event_logs WHERE event_logs.run_id = copies.run_id
        AND dagster_event_type = 'ASSET_CHECK_EVALUATION'),
    %(day)s
FROM asset_check_executions, copies WHERE asset_check_executions.run_id = %(run)s
"""
