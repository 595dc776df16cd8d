"""What sensors share: looks at databases that are bounded in time, and runs that are waited for."""

from collections.abc import Generator
from contextlib import contextmanager

import dagster as dg

from everruns_pipelines.databases.clickhouse import ClickHouseFailure
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.timetable import clock, pause_after

# A tick is killed after a minute. This is what connecting and asking may take of it, in all.
TICK_SECONDS = 20.0

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

# Enough to know how long to wait: by then the pause is at its longest.
_RUNS_LOOKED_AT = 8


class Away(Exception):
    """A database cannot be asked now. The text says why, and quotes no row.

    Args:
        is_late: it answered, but not in the time that a tick has.
        is_busy: somebody else works with it, and will be done soon.
    """

    def __init__(self, reason: str, *, is_late: bool = False, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late
        self.is_busy = is_busy


@contextmanager
def asked() -> Generator[None]:
    """Asks PostgreSQL or ClickHouse in a tick.

    Raises:
        Away: whatever it was.
    """
    import psycopg

    try:
        yield
    except Refusal as refusal:
        raise Away(refusal.detail, is_busy=refusal.code == "locked") from None
    except ClickHouseFailure as failure:
        raise Away(str(failure)) from None
    except psycopg.errors.QueryCanceled:
        raise Away("PostgreSQL needs longer than a tick has", is_late=True) from None
    except psycopg.Error as error:
        # The server's message alone: its details quote rows.
        message = error.diag.message_primary or type(error).__name__
        raise Away(f"PostgreSQL cannot be read: {message}") from None


def pause_after_failed_runs(instance: dg.DagsterInstance, sensor: str, now: float) -> str | None:
    """Why to wait, if the last runs that this sensor launched have failed."""
    records = instance.get_run_records(
        dg.RunsFilter(tags={"dagster/sensor_name": sensor}), limit=_RUNS_LOOKED_AT
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
    return f"The last {failures} runs failed: launching again at {clock(until)}"
