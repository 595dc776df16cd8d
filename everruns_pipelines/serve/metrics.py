"""What Prometheus is told. Nothing here costs a heavy query: what is counted in the outbox is
counted up to a bound, along an index; what must be compared is taken from the newest measurement.
"""

import logging
import time
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from dagster import DagsterInstance, TableMetadataValue
from dagster._core.scheduler.instigation import InstigatorType
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import text

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.orchestration.asset_keys import HEALTH, asset_key
from everruns_pipelines.reporting.catalog import FACTS, SOURCES
from everruns_pipelines.serve.runs import AT_WORK, FINISHED, ProcessContext
from everruns_pipelines.settings import Settings

# Rows of the outbox that are looked at, the oldest first, of each state.
MOST_COUNTED = 10_000
_WINDOW_SECONDS = 3600
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)

# Each part is a scan of the index on status and next_attempt_at that ends early.
_DUE = """
SELECT source_type, count(*), extract(epoch FROM now() - min(greatest(since, 'epoch')))::float8
FROM (
    (
        SELECT source_type, next_attempt_at AS since FROM reporting_outbox
        WHERE status = 'pending' AND next_attempt_at <= now()
        ORDER BY next_attempt_at
        LIMIT %(most)s
    )
    UNION ALL
    (
        SELECT source_type, next_attempt_at FROM reporting_outbox
        WHERE status = 'failed' AND next_attempt_at <= now()
        ORDER BY next_attempt_at
        LIMIT %(most)s
    )
    UNION ALL
    (
        SELECT source_type, next_attempt_at FROM reporting_outbox
        WHERE status = 'processing'
        ORDER BY next_attempt_at
        LIMIT %(most)s
    )
) AS due
GROUP BY source_type
"""
# Along the index on status and time.
_RUNS = """
SELECT pipeline_name, status, count(*) FROM runs
WHERE status = ANY (:at_work) OR (
    status = ANY (:finished)
    AND update_timestamp > now() AT TIME ZONE 'UTC' - make_interval(secs => :window)
)
GROUP BY pipeline_name, status
"""
# Along the index on job and id.
_LAST_SUCCESS = """
SELECT job, end_time FROM unnest(CAST(:jobs AS text[])) AS job CROSS JOIN LATERAL (
    SELECT end_time FROM runs WHERE pipeline_name = job AND status = 'SUCCESS'
    ORDER BY id DESC LIMIT 1
) AS last
"""
# Along the index on selector and time.
_FAILED_TICKS = """
SELECT selector_id, count(*) FROM job_ticks
WHERE selector_id = ANY (CAST(:selectors AS text[])) AND status = 'FAILURE'
    AND timestamp > now() AT TIME ZONE 'UTC' - make_interval(secs => :window)
GROUP BY selector_id
"""
_logger = logging.getLogger(__name__)


class Metrics:
    """Everything that `/metrics` tells: what is asked for anew, and what was counted meanwhile."""

    def __init__(self, settings: Settings, context: ProcessContext) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._registry.register(_Asked(settings, context))
        self._requests = Counter(
            "everruns_api_requests",
            "Requests of the HTTP API that were answered.",
            ["call", "status"],
            registry=self._registry,
        )
        self._durations = Histogram(
            "everruns_api_request_duration_seconds",
            "From a request of the HTTP API to its answer.",
            ["call"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def observe(self, call: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(call, str(status)).inc()
        self._durations.labels(call).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Asked(Collector):
    """What is asked of the databases at each scrape."""

    def __init__(self, settings: Settings, context: ProcessContext) -> None:
        self._settings = settings
        self._postgres = PostgresDatabase(settings)
        self._context = context
        self._instance: DagsterInstance = context.instance

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering asks no database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Each part by itself: a database that is away hides none of the others."""
        failed = _gauge("everruns_scrape_failed", "1 if this part could not be asked.", "part")
        parts: dict[str, Callable[[], Iterator[Metric]]] = {
            **({"outbox": self._outbox} if "reporting" in self._settings.parts else {}),
            "health": self._health,
            "runs": self._runs,
            "daemons": self._daemons,
            "sensors": self._sensors,
        }
        for name, part in parts.items():
            try:
                yield from list(part())
                failed.add_metric([name], 0)
            except Exception as error:
                _logger.warning("Metrics of %s: %s", name, type(error).__name__)
                failed.add_metric([name], 1)
        yield failed

    def _outbox(self) -> Iterator[Metric]:
        with self._postgres.connect() as connection:
            told = connection.execute(_DUE, {"most": MOST_COUNTED}).fetchall()
        rows = {source.type: 0 for source in SOURCES} | {one[0]: one[1] for one in told}
        waiting = {source.type: 0.0 for source in SOURCES} | {one[0]: one[2] for one in told}
        yield _told(
            "everruns_outbox_backlog_rows",
            "Rows of the outbox that are due or being projected; of each state the oldest"
            f" {MOST_COUNTED} are looked at.",
            "source_type",
            rows,
        )
        yield _told(
            "everruns_outbox_oldest_due_seconds",
            "For how long the oldest of them has been due.",
            "source_type",
            waiting,
        )
        yield _told(
            "everruns_fact_lag_seconds",
            "For how long the oldest source that is due for a fact has been waiting.",
            "fact",
            {
                fact.table: max(waiting.get(source.type, 0.0) for source in fact.sources)
                for fact in FACTS
            },
        )

    def _health(self) -> Iterator[Metric]:
        event = self._instance.get_latest_materialization_event(asset_key(self._settings, HEALTH))
        if event is None or event.asset_materialization is None:
            return
        metadata = event.asset_materialization.metadata
        yield _told(
            "everruns_health_age_seconds",
            "How long ago the tables were last compared with their sources.",
            None,
            {"": time.time() - event.timestamp},
        )
        for name in ("backlog", "failed", "parked"):
            if name in metadata:
                yield _told(
                    f"everruns_health_outbox_{name}_rows",
                    f"Rows of the outbox that were {name} when last measured.",
                    None,
                    {"": _number(metadata[name].value)},
                )
        days = metadata.get("days")
        if not isinstance(days, TableMetadataValue):
            return
        for what in ("missing", "stale", "orphaned"):
            sums: Sums[str] = Sums()
            for record in days.records:
                sums[str(record.data["table"])] += int(_number(record.data.get(what)))
            yield _told(
                f"everruns_health_{what}_rows",
                f"Rows of a table that were {what} in the last days when last measured.",
                "table",
                sums,
            )

    def _runs(self) -> Iterator[Metric]:
        at_work, finished = ([one.value for one in states] for states in (AT_WORK, FINISHED))
        jobs = self._jobs()
        storage = cast("Any", self._instance.run_storage)
        with storage.connect() as connection:
            counted = connection.execute(
                text(_RUNS),
                {"at_work": at_work, "finished": finished, "window": _WINDOW_SECONDS},
            ).fetchall()
            ended = connection.execute(text(_LAST_SUCCESS), {"jobs": jobs}).fetchall()
        runs = _gauge(
            "everruns_runs",
            "Runs at work, and runs that ended within the last hour.",
            "job",
            "state",
        )
        for job, state, number in counted:
            runs.add_metric([job, state.lower()], number)
        yield runs
        yield _told(
            "everruns_queued_runs",
            "Runs that wait in the queue.",
            None,
            {"": sum(number for _, state, number in counted if state == "QUEUED")},
        )
        yield _told(
            "everruns_job_last_success_timestamp_seconds",
            "When a job last succeeded.",
            "job",
            {job: at for job, at in ended if at is not None},
        )

    def _jobs(self) -> list[str]:
        with self._context.create_request_context() as workspace:
            return [
                job.name
                for location in workspace.code_locations
                for repository in location.get_repositories().values()
                for job in repository.get_all_jobs()
            ]

    def _daemons(self) -> Iterator[Metric]:
        beats = self._instance.get_daemon_heartbeats()
        yield _told(
            "everruns_daemon_heartbeat_age_seconds",
            "How long ago a daemon was last heard of.",
            "daemon",
            {name: time.time() - beat.timestamp for name, beat in beats.items()},
        )

    def _sensors(self) -> Iterator[Metric]:
        states = self._instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
        storage = cast("Any", self._instance.schedule_storage)
        with storage.connect() as connection:
            counted = connection.execute(
                text(_FAILED_TICKS),
                {"selectors": [one.selector_id for one in states], "window": _WINDOW_SECONDS},
            ).fetchall()
        failed = dict(tuple(row) for row in counted)
        yield _told(
            "everruns_sensor_failed_ticks",
            "Ticks of a sensor that failed within the last hour.",
            "sensor",
            {one.instigator_name: failed.get(one.selector_id, 0) for one in states},
        )


def _gauge(name: str, told: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, told, labels=labels)


def _told(name: str, told: str, label: str | None, values: Any) -> GaugeMetricFamily:
    """A gauge with one label, or with none and one value."""
    gauge = _gauge(name, told, *([] if label is None else [label]))
    for labelled, value in values.items():
        gauge.add_metric([] if label is None else [labelled], value)
    return gauge


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
