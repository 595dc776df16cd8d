"""When things run by themselves: cron lines, the days that a run covers, how long to back off."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import dagster as dg

from everruns_pipelines.orchestration.partitions import day_range_tags
from everruns_pipelines.settings import WEEKDAYS, Settings

# One nightly run that is missed is worth a look, two are a fault.
STALE_AFTER = timedelta(hours=26)
FAILED_AFTER = timedelta(hours=50)

_NIGHTLY_DAYS = 2
_WEEKLY_DAYS = 90

_SHORTEST_PAUSE = 30.0
_LONGEST_PAUSE = 3600.0


def cron(at: str) -> str:
    """The cron line of `HH:MM`, every day, or of a weekday before it."""
    weekday, _, time = at.rpartition(" ")
    hour, minute = time.split(":")
    return f"{int(minute)} {int(hour)} * * {WEEKDAYS.index(weekday) if weekday else '*'}"


def day_schedules(settings: Settings, domain: str, job: Any) -> list[dg.ScheduleDefinition]:
    """Nightly two days, weekly a quarter: each a range of partitions in one run of `job`."""
    return [
        _day_schedule(settings, f"nightly_{domain}", job, settings.nightly_at, _NIGHTLY_DAYS),
        _day_schedule(settings, f"weekly_{domain}", job, settings.weekly_at, _WEEKLY_DAYS),
    ]


def _day_schedule(
    settings: Settings, name: str, job: Any, at: str, days: int
) -> dg.ScheduleDefinition:
    @dg.schedule(  # pyright: ignore[reportUnknownMemberType]
        name=name,
        cron_schedule=cron(at),
        job=job,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Materializes and checks the last {days} days, today included, "
        f"in one run at {at} UTC.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        today = context.scheduled_execution_time.astimezone(UTC).date()
        return dg.RunRequest(run_key=today.isoformat(), tags=day_range_tags(settings, today, days))

    return schedule


def hourly_schedule(name: str, job: Any, minute: int, description: str) -> dg.ScheduleDefinition:
    """A run of `job` every hour, so many minutes after it began."""
    return dg.ScheduleDefinition(
        name=name,
        job=job,
        cron_schedule=f"{minute} * * * *",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=description,
    )


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(_SHORTEST_PAUSE * 2 ** (failures - 1), _LONGEST_PAUSE) if failures else 0.0


@dataclass(frozen=True)
class BackOff:
    """What a sensor remembers of a database that is away: it is kept in the sensor's cursor.

    Args:
        failures: ticks in a row that did not reach it.
        until: when to try again, in seconds since the epoch.
    """

    failures: int = 0
    until: float = 0.0

    @classmethod
    def read(cls, cursor: str | None) -> Self:
        """What the cursor says; nothing if it is empty, or of another version of ours."""
        try:
            return cls(**json.loads(cursor or "{}"))
        except (TypeError, ValueError):
            return cls()

    def write(self) -> str:
        """The cursor."""
        return json.dumps(asdict(self))

    def again(self, now: float) -> "BackOff":
        """One more failure, and a longer pause."""
        return BackOff(self.failures + 1, now + pause_after(self.failures + 1))

    def obstacle(self, now: float) -> str | None:
        """Why not to try now."""
        if now >= self.until:
            return None
        times = f"The database was away {self.failures} times in a row"
        return f"{times}: trying again at {clock(self.until)}"


def clock(seconds: float) -> str:
    """A time in seconds since the epoch, for people."""
    return f"{datetime.fromtimestamp(seconds, UTC):%F %T} UTC"
