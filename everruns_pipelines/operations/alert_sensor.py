"""The sensor that finds what people are to be told. What and how they are told is in `alerts`.

See https://docs.dagster.io/guides/automate/sensors.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import dagster as dg

from everruns_pipelines.databases.postgres import ItemsPostgresDatabase, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.operations.alerts import Memory, Problem, tell
from everruns_pipelines.orchestration.asset_keys import HEALTH, asset_key
from everruns_pipelines.orchestration.checks import evaluations
from everruns_pipelines.orchestration.retries import may_be_retried
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord

AWAY_SECONDS = 600
LATE_SECONDS = 900
# Told within a minute from the outbox itself, not by these checks an hour later.
_TOLD_HERE = {"no_parked_rows", "no_late_rows"}
_MOST_COUNTED = 10_000
_RUNS_PER_TICK = 200
_RESULTS_PER_TICK = 10


def alert_sensors(settings: Settings, definitions: dg.Definitions) -> list[dg.SensorDefinition]:
    """The sensor, if there is anybody to tell.

    Args:
        definitions: what is watched: the runs of its jobs, and its checks.
    """
    if settings.alert_urls is None:
        return []
    checks: Any = definitions.asset_checks
    jobs: Any = definitions.jobs
    health = _page(asset_key(settings, HEALTH))
    check_keys = [key for one in checks for key in one.check_keys if key.name not in _TOLD_HERE]
    job_names = {"_".join([*settings.asset_prefix, job.name]) for job in jobs}

    @dg.sensor(  # pyright: ignore[reportUnknownMemberType]
        name="alert_sensor",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells the receivers of EVERRUNS_ALERT_URLS: a run that failed for good, a "
        "failed check, parked rows, rows that have waited for 15 minutes, a database that has been "
        "away for 10 minutes. Each once, and once when it is over.",
    )
    def alert_sensor(
        context: dg.SensorEvaluationContext,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
        everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
    ) -> dg.SensorResult:
        now = time.time()
        memory = Memory.read(context.cursor, now)
        seen: dict[str, Sequence[Problem] | None] = {
            "run": _failed_runs(context.instance, memory, job_names if settings.is_guest else None),
            "check": _failed_checks(context.instance, memory, check_keys),
        }
        reached: dict[str, bool] = {}
        if "reporting" in settings.parts:
            answer = _outbox(everruns_postgres, health)
            reached[everruns_postgres.variable] = answer is not _AWAY
            seen["parked"], seen["late"] = (None, None) if isinstance(answer, str) else answer
        if "items" in settings.parts:
            if everruns_items_postgres.variable not in reached:
                reached[everruns_items_postgres.variable] = _answers(everruns_items_postgres)
            dsn = settings.clickhouse_dsn
            if dsn is not None and not dsn.get_secret_value().startswith("chdb"):
                reached["EVERRUNS_CLICKHOUSE_DSN"] = _clickhouse_answers(dsn.get_secret_value())
        seen["away"] = _away(memory, reached, now, health)
        sent = tell(settings, memory, seen, now)
        return dg.SensorResult(
            skip_reason=f"{len(memory.told)} problems are known; {sent} messages were sent",
            cursor=memory.write(),
        )

    return [alert_sensor]


def _failed_runs(
    instance: dg.DagsterInstance, memory: Memory, jobs: set[str] | None
) -> list[Problem]:
    """What failed for good, until a run of the same succeeds.

    Args:
        jobs: those that are ours; None if all are.
    """
    records = instance.get_run_records(
        dg.RunsFilter(
            statuses=[dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS],
            updated_after=datetime.fromtimestamp(memory.runs_until, UTC),
        ),
        limit=_RUNS_PER_TICK,
        order_by="update_timestamp",
        ascending=True,
    )
    for record in records:
        memory.runs_until = max(memory.runs_until, record.update_timestamp.timestamp())
        run = record.dagster_run
        if jobs is not None and run.job_name not in jobs:
            continue
        if run.status == dg.DagsterRunStatus.SUCCESS:
            memory.failed.pop(_subject(run), None)
        elif not may_be_retried(instance, run):
            ended = record.end_time or record.update_timestamp.timestamp()
            _, since = memory.failed.get(_subject(run), ("", ended))
            memory.failed[_subject(run)] = (run.run_id, since)
    return [
        Problem(
            key=f"run:{subject}",
            title=f"{subject} failed",
            what=f"Run {run_id} of {subject} failed and will not be tried again",
            since=since,
            repair="read why on its page, then launch it again there",
            page=f"/runs/{run_id}",
        )
        for subject, (run_id, since) in memory.failed.items()
    ]


def _subject(run: dg.DagsterRun) -> str:
    """What a run is of: its job, or the assets that somebody materialized."""
    if not run.job_name.startswith("__ASSET_JOB"):
        return run.job_name
    return ", ".join(sorted(key.to_user_string() for key in run.asset_selection or ())) or "assets"


def _failed_checks(
    instance: dg.DagsterInstance, memory: Memory, keys: Sequence[dg.AssetCheckKey]
) -> list[Problem]:
    """Checks of error severity that fail, or have failed since the last tick: what heals in less is
    told, too.
    """
    until, problems = memory.checks_until, list[Problem]()
    for key in keys:
        results = list(evaluations(instance, key, _RESULTS_PER_TICK))
        new = [
            (record, evaluation)
            for number, (record, evaluation) in enumerate(results)
            if number == 0 or (until is not None and record.id > until)
        ]
        memory.checks_until = max([memory.checks_until or 0, *(record.id for record, _ in new)])
        problems += [
            _failed_check(key, record, evaluation)
            for record, evaluation in new
            if not evaluation.passed and evaluation.severity == dg.AssetCheckSeverity.ERROR
        ][:1]
    return problems


def _failed_check(
    key: dg.AssetCheckKey,
    record: "AssetCheckExecutionRecord",
    evaluation: dg.AssetCheckEvaluation,
) -> Problem:
    remedy = evaluation.metadata.get("to_repair")
    asset = key.asset_key.to_user_string()
    return Problem(
        key=f"check:{asset}:{key.name}",
        title=f"{asset}: {key.name} failed",
        what=(evaluation.description or f"{key.name} failed").rstrip("."),
        since=record.create_timestamp,
        repair=str(remedy.value)
        if isinstance(remedy, dg.TextMetadataValue)
        else "materialize the days that the check names",
        page=f"{_page(key.asset_key)}?view=checks",
    )


def _page(key: dg.AssetKey) -> str:
    return f"/assets/{'/'.join(key.path)}"


_AWAY, _UNKNOWN = "away", "unknown"


def _outbox(postgres: PostgresDatabase, health: str) -> tuple[list[Problem], list[Problem]] | str:
    """Parked rows, and rows that have waited for too long; or why that cannot be told.

    Args:
        health: the page of `pipeline_health`.
    """
    import psycopg

    from everruns_pipelines.reporting.watch import find_due

    try:
        with postgres.connect() as connection:
            connection.execute("SET statement_timeout = '5s'")
            parked = connection.execute(
                "SELECT count(*), extract(epoch FROM min(greatest('epoch', updated_at)))::float8"
                " FROM (SELECT updated_at FROM reporting_outbox"
                " WHERE status = 'failed' AND next_attempt_at = 'infinity' LIMIT %s) AS parked",
                [_MOST_COUNTED],
            ).fetchone()
            oldest = find_due(connection).oldest
    except Refusal:
        return _AWAY
    except psycopg.OperationalError as error:
        # With a state the server has answered.
        return _UNKNOWN if error.sqlstate else _AWAY
    except psycopg.Error:
        return _UNKNOWN
    assert parked is not None
    number, since = parked
    late = time.time() - oldest.timestamp() if oldest else 0.0
    return (
        [
            Problem(
                key="parked:outbox",
                title="outbox rows are parked",
                what=f"{'At least ' if number == _MOST_COUNTED else ''}{number} rows of the outbox "
                "have failed too often and are not tried any more",
                since=since,
                repair="`everruns-pipelines diagnose` says why they failed; once that is mended, "
                "`everruns-pipelines unpark`",
                page=health,
            )
        ]
        if number
        else [],
        [
            Problem(
                key="late:outbox",
                title="facts are late",
                what=f"The oldest row of the outbox waits for {late / 60:.0f} minutes",
                since=oldest.timestamp(),
                repair="see that the daemon runs and reporting_outbox_sensor is on; "
                "`everruns-pipelines project` drains the outbox at once",
                page="/overview/sensors",
            )
        ]
        if oldest and late > LATE_SECONDS
        else [],
    )


def _answers(postgres: PostgresDatabase) -> bool:
    import psycopg

    try:
        with postgres.connect() as connection:
            connection.execute("SELECT 1")
    except (Refusal, psycopg.Error):
        return False
    return True


def _clickhouse_answers(dsn: str) -> bool:
    """Whether the server is up: it says so to everybody, over HTTP. What the driver trusts is
    trusted: certificates of the system, and of SSL_CERT_FILE.
    """
    from http.client import HTTPException
    from urllib.request import urlopen

    scheme, port = ("https", 8443) if dsn.startswith("clickhouses:") else ("http", 8123)
    parts = urlsplit(dsn)
    url = f"{scheme}://{parts.hostname}:{parts.port or port}/ping"
    try:
        with urlopen(url, timeout=5):  # noqa: S310, no other scheme
            return True
    except (OSError, HTTPException):
        return False


def _away(memory: Memory, reached: dict[str, bool], now: float, health: str) -> list[Problem]:
    memory.away = {
        variable: memory.away.get(variable, now)
        for variable, answered in reached.items()
        if not answered
    }
    return [
        Problem(
            key=f"away:{variable}",
            title=f"the database of {variable} is away",
            what=f"The database that {variable} names cannot be used",
            since=since,
            repair="`everruns-pipelines doctor` says what is wrong",
            page=health,
        )
        for variable, since in memory.away.items()
        if now - since >= AWAY_SECONDS
    ]
