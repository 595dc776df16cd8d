"""When things run by themselves: cron lines, the days that a run covers, how long to back off."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Self

from everruns_pipelines.settings import WEEKDAYS, Settings

# One nightly run that is missed is worth a look, two are a fault.
STALE_AFTER = timedelta(hours=26)
FAILED_AFTER = timedelta(hours=50)

_SHORTEST_PAUSE = 30.0
_LONGEST_PAUSE = 3600.0


def cron(at: str) -> str:
    """The cron line of `HH:MM`, every day, or of a weekday before it."""
    weekday, _, time = at.rpartition(" ")
    hour, minute = time.split(":")
    return f"{int(minute)} {int(hour)} * * {WEEKDAYS.index(weekday) if weekday else '*'}"


def day_range_tags(settings: Settings, last: date, days: int) -> Mapping[str, str]:
    """Tags that make a run cover the `days` partitions up to and with `last`, all in one run."""
    first = max(settings.reporting_start, last - timedelta(days=days - 1))
    return {
        "dagster/asset_partition_range_start": first.isoformat(),
        "dagster/asset_partition_range_end": last.isoformat(),
    }


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
