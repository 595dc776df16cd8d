"""What items do by themselves: the sensor that heals lost POSTs, and the schedules of the days.

Nothing is computed here. See https://docs.dagster.io/guides/automate/sensors and
https://docs.dagster.io/guides/automate/schedules.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import groupby, islice
from typing import TYPE_CHECKING, Self

import dagster as dg

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure
from everruns_pipelines.databases.postgres import ItemsPostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items.jobs import check_items, rebuild_items
from everruns_pipelines.orchestration.timetable import BackOff, day_schedules, hourly_schedule
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.items.unstored import Reported, Unstored

# In seconds. A span's batch and its item's POST may be under way for a while after its end.
_GRACE = 120
# What comes in later than that is seen again within this time, and after it by the nightly run.
_OVERLAP = 600
# After a longer absence the nightly run repairs what came before.
_LONGEST_LOOK_BACK = 6 * 3600
# Another run that reads the embedded ClickHouse is not worth waiting for: the next tick comes soon.
_PATIENCE = 5.0
_TRACES_PER_RUN = 200

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
        since: where the next look begins, in seconds since the epoch.
        launched: failures that a run was launched for: a digest of each, and when its span ended.
    """

    since: int = 0
    launched: dict[str, int] = field(default_factory=dict[str, int])
    back_off: BackOff = field(default_factory=BackOff)

    @classmethod
    def read(cls, cursor: str | None) -> Self:
        try:
            kept = json.loads(cursor or "{}")
            back_off = BackOff(**kept.pop("back_off", {}))
            return cls(**kept, back_off=back_off)
        except (AttributeError, TypeError, ValueError):
            return cls()

    def write(self) -> str:
        return json.dumps(asdict(self))

    def after(self, reported: "Reported", new: "Sequence[Unstored]") -> "_Memory":
        """What to remember once runs for the new failures are launched."""
        since = reported.until if reported.is_cut else reported.until - _OVERLAP
        launched = {**self.launched, **{_digest(failure): failure.ended for failure in new}}
        # What ended earlier is not looked at again.
        return _Memory(since, {key: ended for key, ended in launched.items() if ended > since})


@dg.sensor(  # pyright: ignore[reportUnknownMemberType]
    name="item_failures_sensor",
    job=rebuild_items,
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Launches rebuild_items for sessions whose spans ended recently with envelopes "
    "that have no item: up to 200 traces of a project per run, each failure once. "
    "What it misses, the nightly run repairs.",
)
def item_failures_sensor(
    context: dg.SensorEvaluationContext,
    everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
    everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
) -> dg.SensorResult:
    """Look at what was reported since the last look; launch what lacks its item."""
    import psycopg

    now = time.time()
    memory = _Memory.read(context.cursor)
    if now < memory.back_off.until:
        return _skipped(f"Trying again at {_clock(memory.back_off.until)}", memory)
    if not everruns_clickhouse.is_there():
        return _skipped("No spans are stored yet", memory)
    try:
        until = int(now) - _GRACE
        reported = _reported(
            everruns_clickhouse, max(memory.since, until - _LONGEST_LOOK_BACK), until
        )
        unstored = _unstored(everruns_items_postgres, reported)
    except Refusal as refusal:
        if refusal.code == "locked":
            return _skipped(refusal.detail, memory)
        return _skipped(refusal.detail, replace(memory, back_off=memory.back_off.again(now)))
    except ClickHouseFailure as failure:
        return _skipped(str(failure), replace(memory, back_off=memory.back_off.again(now)))
    except psycopg.Error as error:
        # The server's message alone: its details quote rows.
        message = error.diag.message_primary or type(error).__name__
        return _skipped(
            f"PostgreSQL cannot be read: {message}",
            replace(memory, back_off=memory.back_off.again(now)),
        )
    new = [failure for failure in unstored if _digest(failure) not in memory.launched]
    memory = memory.after(reported, new)
    seen = f"{len(reported.rows)} items reported by spans that ended up to {_clock(reported.until)}"
    if not new:
        return _skipped(f"{seen}; {len(unstored)} lack their row, and were launched before", memory)
    context.log.info(f"{seen}; {len(new)} lack their row")
    return dg.SensorResult(list(_run_requests(new)), cursor=memory.write())


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


def _reported(clickhouse: ClickHouseDatabase, since: int, until: int) -> "Reported":
    from everruns_pipelines.items.unstored import find_reported

    with clickhouse.connect(patience=_PATIENCE) as opened:
        return find_reported(opened, clickhouse.settings.spans_table, since, until)


def _unstored(postgres: ItemsPostgresDatabase, reported: "Reported") -> "list[Unstored]":
    from everruns_pipelines.items.unstored import find_unstored

    if not reported.rows:
        return []
    with postgres.connect() as connection:
        return find_unstored(connection, reported)


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
    return sha256(f"{failure.project} {failure.dedupe_key}".encode()).hexdigest()[:16]


def _skipped(reason: str, memory: _Memory) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=reason, cursor=memory.write())


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%F %T} UTC"
