"""What reporting does by itself: sensors that drain the outbox and heal, schedules of the facts.

Nothing is computed here. See https://docs.dagster.io/guides/automate/sensors and
https://docs.dagster.io/guides/automate/schedules.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self, cast

import dagster as dg

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.orchestration.damage import no_damage
from everruns_pipelines.orchestration.ticks import (
    TICK_SECONDS,
    UNFINISHED,
    Away,
    asked,
    pause_after_failed_runs,
)
from everruns_pipelines.orchestration.timetable import (
    BackOff,
    clock,
    day_schedules,
    hourly_schedule,
)
from everruns_pipelines.reporting.jobs import (
    backfill_reporting,
    check_reporting,
    project_reporting,
)
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.reporting.watch import Due

SENSOR = "reporting_outbox_sensor"
HEALING_SENSOR = "reporting_healing_sensor"

# A run whose process was killed is unfinished for as long as nobody notices. Projectors do not
# disturb each other, so another beside a run that has been at work for this long is safe.
_AT_WORK = timedelta(hours=1)
# A run that lingers is relieved so long before it ends, in seconds: until the next one has been
# seen to be wanted, has left the queue and has started, nobody would drain the outbox. A process
# starts in five seconds, a pod in thirty.
_RELIEF_SECONDS = 60
# As many as one backfill enqueues. The next one follows once these are projected.
_HEALED_AT_ONCE = 10_000
# Sources that have only changed wait for others for so many seconds: each run is kept for a month.
# With the next tick and the start of a run that is less than ten minutes. Damage does not wait.
_CHANGES_WAIT = 540
# Looking takes at most a tenth of the time.
_PAUSES_PER_LOOK = 9

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
    description="Launches project_reporting while rows of the outbox are due, one run after the "
    "other. A run lingers for more; the next one begins shortly before it ends. "
    "It waits longer and longer while the database is away, or while its runs fail.",
)
def reporting_outbox_sensor(
    context: dg.SensorEvaluationContext, everruns_postgres: dg.ResourceParam[PostgresDatabase]
) -> dg.SensorResult:
    """Look what is due; launch unless a run of this sensor is at it already."""
    from everruns_pipelines.reporting.watch import find_due

    now = time.time()
    back_off = BackOff.read(context.cursor)
    if obstacle := back_off.obstacle(now):
        return _skipped(obstacle, back_off)
    try:
        with asked(), everruns_postgres.connect(within=TICK_SECONDS) as connection:
            due = find_due(connection)
    except Away as away:
        return _skipped(str(away), back_off.again(now))
    if not due.anything:
        return _skipped(f"Nothing is due. {_next(due)}")
    obstacle = _run_at_work(context.instance, SENSOR, now) or pause_after_failed_runs(
        context.instance, SENSOR, now
    )
    if obstacle:
        return _skipped(f"{_seen(due)}. {obstacle}")
    context.log.info(_seen(due))
    linger = {"linger_seconds": everruns_postgres.settings.linger_seconds}
    request = dg.RunRequest(run_config={"ops": {"project": {"config": linger}}})
    return dg.SensorResult([request], cursor=BackOff().write())


@dataclass(frozen=True)
class _Healing:
    """What the healing sensor remembers.

    Args:
        next_look: when to look again, in seconds since the epoch.
        next_changes: when to enqueue what has only changed.
        by_run: the last look took longer than a tick may: a run was launched to look.
    """

    next_look: float = 0.0
    next_changes: float = 0.0
    by_run: bool = False
    back_off: BackOff = field(default_factory=BackOff)

    @classmethod
    def read(cls, cursor: str | None) -> Self:
        """What the cursor says; nothing if it is empty, or of another version of ours."""
        try:
            kept = json.loads(cursor or "{}")
            back_off = BackOff(**kept.pop("back_off", {}))
            return cls(**kept, back_off=back_off)
        except (AttributeError, TypeError, ValueError):
            return cls()

    def skipped(self, reason: str, news: Sequence[dg.AssetCheckEvaluation] = ()) -> dg.SensorResult:
        return dg.SensorResult(
            skip_reason=reason, cursor=json.dumps(asdict(self)), asset_events=news
        )

    def launched(self) -> dg.SensorResult:
        limit = {"limit": _HEALED_AT_ONCE}
        request = dg.RunRequest(run_config={"ops": {"enqueue": {"config": limit}}})
        return dg.SensorResult([request], cursor=json.dumps(asdict(self)))


@dg.sensor(  # pyright: ignore[reportUnknownMemberType]
    name=HEALING_SENSOR,
    job=backfill_reporting,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Looks at all history every EVERRUNS_HEAL_SECONDS (300), and launches "
    "backfill_reporting where a fact is missing or stale. Sources that have only just changed wait "
    "for others, so that they follow within ten minutes. Where looking takes longer than a tick "
    "may, the run looks. Looking takes at most a tenth of the time.",
)
def reporting_healing_sensor(
    context: dg.SensorEvaluationContext, everruns_postgres: dg.ResourceParam[PostgresDatabase]
) -> dg.SensorResult:
    """Look what is missing or stale, whatever its age; launch if anything is."""
    from everruns_pipelines.reporting.backfill import look
    from everruns_pipelines.reporting.database import prepare

    now = time.time()
    memory = _Healing.read(context.cursor)
    interval = everruns_postgres.settings.heal_seconds
    if obstacle := memory.back_off.obstacle(now):
        return memory.skipped(obstacle)
    obstacle = _run_at_work(context.instance, HEALING_SENSOR, now) or pause_after_failed_runs(
        context.instance, HEALING_SENSOR, now
    )
    if obstacle:
        return memory.skipped(obstacle)
    if memory.by_run:
        memory = replace(memory, next_look=_after_last_run(context.instance, interval))
    if now < memory.next_look:
        return memory.skipped(f"The next look is at {clock(memory.next_look)}")
    try:
        with asked(), everruns_postgres.connect(within=TICK_SECONDS) as connection:
            prepare(connection)
            began = time.monotonic()
            found = look(connection)
            seconds = time.monotonic() - began
    except Away as away:
        if not away.is_late:
            return replace(memory, back_off=memory.back_off.again(now)).skipped(str(away))
        context.log.info(f"Looking takes longer than {TICK_SECONDS:g} s: a run looks")
        return _Healing(by_run=True).launched()
    wanting = sum(missing.sources for missing in found.values())
    pause = _PAUSES_PER_LOOK * seconds
    if wanting < _HEALED_AT_ONCE:
        pause = max(pause, interval)
    memory = _Healing(next_look=now + pause, next_changes=memory.next_changes)
    counts = ", ".join(
        f"{missing.sources} of {source_type}" for source_type, missing in found.items()
    )
    damaged = sum(missing.damaged for missing in found.values())
    if damaged or wanting >= _HEALED_AT_ONCE or (wanting and now >= memory.next_changes):
        context.log.info(f"Missing or stale, by source: {counts}; {damaged} of them are damaged")
        return replace(memory, next_changes=now + _CHANGES_WAIT).launched()
    news = list(no_damage(context.instance, everruns_postgres.settings))
    if wanting:
        memory = replace(memory, next_look=min(memory.next_look, memory.next_changes))
        reason = f"Only just changed, by source: {counts}. They wait for others"
    else:
        reason = f"A backfill has nothing to do, as a look of {seconds:.2f} s has found"
    return memory.skipped(f"{reason}; the next look is at {clock(memory.next_look)}", news)


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


def _run_at_work(instance: dg.DagsterInstance, sensor: str, now: float) -> str | None:
    """Which run of a sensor's is at it already, and will be for a while. Runs that somebody else
    launched end with what was due when they began: they do not stand in the way.
    """
    records = instance.get_run_records(
        dg.RunsFilter(
            tags={"dagster/sensor_name": sensor},
            statuses=UNFINISHED,
            created_after=datetime.fromtimestamp(now, UTC) - _AT_WORK,
        )
    )
    for record in records:
        if now < _relieved_at(record):
            return f"Run {record.dagster_run.run_id} is at work"
    return None


def _relieved_at(record: dg.RunRecord) -> float:
    """When another run is to begin beside this one, in seconds since the epoch."""
    ops = cast("dict[str, Any]", record.dagster_run.run_config.get("ops", {}))
    linger = ops.get("project", {}).get("config", {}).get("linger_seconds", 0)
    if not linger or record.start_time is None:
        return math.inf
    return record.start_time + linger - min(_RELIEF_SECONDS, linger / 2)


def _after_last_run(instance: dg.DagsterInstance, interval: float) -> float:
    """When to look again after the run that looked last, in seconds since the epoch."""
    records = instance.get_run_records(
        dg.RunsFilter(tags={"dagster/sensor_name": HEALING_SENSOR}), limit=1
    )
    for record in records:
        if record.start_time is not None and record.end_time is not None:
            seconds = record.end_time - record.start_time
            return record.end_time + max(interval, _PAUSES_PER_LOOK * seconds)
    return 0.0
