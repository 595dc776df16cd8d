"""What items do by themselves: the sensor that heals lost POSTs, and the schedules of the days.

Nothing is computed here. See https://docs.dagster.io/guides/automate/sensors and
https://docs.dagster.io/guides/automate/schedules.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import groupby, islice
from typing import TYPE_CHECKING, Self

import dagster as dg

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import ItemsPostgresDatabase
from everruns_pipelines.items.jobs import check_items, rebuild_items
from everruns_pipelines.items.span_table import Position
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
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.items.unstored import Look, Unstored, Watch

SENSOR = "item_failures_sensor"

# In seconds. A span's batch and its item's POST may be under way for a while after its end.
_GRACE = 120
# What comes in later than that is found by a second look at the time behind the first.
_SECOND_LOOK = 600
# What is later still is found by a third look, which passes over two days in less than an hour: an
# hour of them with each tick. The nightly run repairs the rest.
_THIRD_LOOK = 48 * 3600
_HOUR = 3600
# After a longer absence the first look leaves what came before to the third.
_LONGEST_LOOK_BACK = 6 * _HOUR
_SECOND = 1_000_000_000
_TRACES_PER_RUN = 200
# Of more failures in that time the earlier ones are forgotten, and not looked at a second time.
_MOST_REMEMBERED = 10_000

_START = Position(0)

materialize_items = dg.define_asset_job(  # pyright: ignore[reportUnknownMemberType]
    "materialize_items",
    selection=dg.AssetSelection.groups("items"),  # pyright: ignore[reportUnknownMemberType]
    description="Make days of items right, and check that they are. "
    "The schedules launch it; pick a day to launch it yourself.",
    executor_def=dg.in_process_executor,
)


@dataclass(frozen=True)
class _Memory:
    """What the sensor's cursor holds.

    Args:
        first: how far the first look at reported items came.
        second: where the second look goes on, which passes over the last minutes again and again.
        third: where the third look goes on, which passes over the last days.
        launched: failures that a run was launched for: a digest of each, and when its span ended,
            in seconds since the epoch.
        forgotten: failures of spans that ended up to then are not among them.
    """

    first: Position
    second: Position
    third: Position = _START
    launched: dict[str, int] = field(default_factory=dict[str, int])
    forgotten: int = 0
    back_off: BackOff = field(default_factory=BackOff)

    @classmethod
    def read(cls, cursor: str | None, until: int) -> Self:
        """What a cursor holds, for looks up to a time in seconds since the epoch."""
        earliest = _at(until - _LONGEST_LOOK_BACK)
        try:
            kept = json.loads(cursor or "{}")
            memory = cls(
                max(Position(**kept["first"]), earliest),
                Position(**kept["second"]),
                Position(**kept["third"]),
                kept["launched"],
                kept["forgotten"],
                BackOff(**kept["back_off"]),
            )
        except (KeyError, TypeError, ValueError):
            # What the first look comes to now needs no second one.
            return cls(earliest, earliest, _at(until - _THIRD_LOOK))
        again = _at(max(until - _SECOND_LOOK, memory.forgotten + 1))
        third = max(memory.third, _at(until - _THIRD_LOOK))
        return replace(memory, second=max(memory.second, again), third=third)

    def write(self) -> str:
        return json.dumps(asdict(self))

    def launches(self, look: "Look") -> "tuple[list[Unstored], _Memory]":
        """The failures that no run was launched for, and what to remember once it is."""
        found = {_digest(failure): failure for failure in look.unstored}
        new = [failure for digest, failure in found.items() if digest not in self.launched]
        ended = {digest: failure.ended for digest, failure in found.items()}
        return new, replace(self, launched={**self.launched, **ended})

    def after(self, first: "Look", second: "Look", until: int) -> "_Memory":
        """What to remember once both looks came so far."""
        # It came to where the first look had come before: it begins anew.
        is_round = second.reached >= self.first
        # The second look does not come to what ended earlier.
        in_reach = sorted(
            (ended, digest)
            for digest, ended in self.launched.items()
            if ended >= until - _SECOND_LOOK
        )
        forgotten = in_reach[:-_MOST_REMEMBERED]
        return _Memory(
            first.reached,
            _START if is_round else second.reached,
            self.third,
            {digest: ended for ended, digest in in_reach[len(forgotten) :]},
            forgotten[-1][0] if forgotten else self.forgotten,
        )


@dg.sensor(  # pyright: ignore[reportUnknownMemberType]
    name=SENSOR,
    job=rebuild_items,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Launches rebuild_items for sessions whose spans ended recently with envelopes "
    "that have no item: up to 200 traces of a project per run, each failure once. "
    "What came in late by hours is found within an hour. "
    "It waits longer and longer while a database is away, or while its runs fail.",
)
def item_failures_sensor(
    context: dg.SensorEvaluationContext,
    everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
    everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
) -> dg.SensorResult:
    """Look at what was reported since the last look; launch what lacks its item."""
    from everruns_pipelines.items.unstored import Watch

    now = time.time()
    until = int(now) - _GRACE
    memory = _Memory.read(context.cursor, until)
    obstacle = memory.back_off.obstacle(now) or pause_after_failed_runs(
        context.instance, SENSOR, now
    )
    if obstacle:
        return _skipped(obstacle, memory)
    if not everruns_clickhouse.is_there():
        return _skipped("No spans are stored yet", memory)
    try:
        with (
            asked(),
            Watch.opened(everruns_items_postgres, everruns_clickhouse, TICK_SECONDS) as watch,
        ):
            first = watch.look(memory.first, _at(until))
            second = watch.look(memory.second, memory.first)
            third, memory = _third_look(context, watch, memory, until)
    except Away as away:
        if away.is_busy:
            return _skipped(str(away), memory)
        return _skipped(str(away), replace(memory, back_off=memory.back_off.again(now)))
    late, memory = memory.launches(second)
    new, memory = memory.launches(first)
    memory = memory.after(first, second, until)
    reached = clock(first.reached.ended_ns / _SECOND)
    seen = f"{first.seen} items reported by spans that ended up to {reached}"
    if not (new or late or third):
        lack = len(first.unstored) + len(second.unstored)
        return _skipped(f"{seen}; {lack} lack their row, and were launched before", memory)
    found = [*third, *late, *new]
    context.log.info(f"{seen}; {len(found)} lack their row")
    return dg.SensorResult(list(_run_requests(found)), cursor=memory.write())


def _third_look(
    context: dg.SensorEvaluationContext, watch: "Watch", memory: _Memory, until: int
) -> "tuple[Sequence[Unstored], _Memory]":
    """The failures of the next hour of the last days, and what to remember.

    Neither of the other looks comes there; but what they found may be healed just now by a run.
    """
    launched = dg.RunsFilter(tags={"dagster/sensor_name": SENSOR}, statuses=UNFINISHED)
    if context.instance.get_runs(launched, limit=1):
        return [], memory
    end = min(_at(until - _SECOND_LOOK), memory.first)
    next_hour = min(Position(memory.third.ended_ns + _HOUR * _SECOND), end)
    try:
        with asked():
            look = watch.look(memory.third, next_hour)
    except Away as away:
        context.log.warning(f"An hour of the last days is left to the nightly run: {away}")
        return [], replace(memory, third=next_hour)
    is_round = look.reached >= end
    return look.unstored, replace(memory, third=_START if is_round else look.reached)


def item_schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """Nightly and weekly the days are materialized, hourly they are looked at."""
    return [
        *day_schedules(settings, "items", materialize_items),
        hourly_schedule(
            "hourly_items_check",
            check_items,
            10,
            "Looks every hour whether the items of the last 7 days are right; repairs nothing.",
        ),
    ]


def _run_requests(failures: "Sequence[Unstored]") -> Iterator[dg.RunRequest]:
    """One run per project and so many traces."""
    ordered = sorted(failures, key=_project)
    for (organization, workspace, project), group in groupby(ordered, key=_project):
        traces = iter(dict.fromkeys(failure.trace_id for failure in group))
        while some := list(islice(traces, _TRACES_PER_RUN)):
            config = {
                "organization": organization,
                "workspace": workspace,
                "project": project,
                "run_ids": some,
            }
            yield dg.RunRequest(run_config={"ops": {"rebuild": {"config": config}}})


def _project(failure: "Unstored") -> tuple[str, str, str]:
    return failure.organization, failure.workspace, failure.project


def _digest(failure: "Unstored") -> str:
    return sha256(f"{failure.project} {failure.position.dedupe_key}".encode()).hexdigest()[:16]


def _at(seconds: int) -> Position:
    return Position(seconds * _SECOND)


def _skipped(reason: str, memory: _Memory) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=reason, cursor=memory.write())
