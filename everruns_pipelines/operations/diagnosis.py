"""What is wrong with the derived data, and how far behind it is: one answer for the command
`diagnose` and for the asset `pipeline_health`. Reads only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Self

import psycopg
from psycopg.rows import class_row
from pydantic_core import to_jsonable_python

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure
from everruns_pipelines.databases.postgres import (
    Connection,
    ItemsPostgresDatabase,
    PostgresDatabase,
)
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.items.rebuild import rebuild_day
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.reconcile import compare_days
from everruns_pipelines.reporting.watch import find_due
from everruns_pipelines.settings import Part, Settings

MOST_DAYS = 366
_FAILURES_SHOWN = 10
ITEMS = "items"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Databases:
    """Where to look. Nothing is asked of the databases of a part that is off."""

    reporting: PostgresDatabase
    items: ItemsPostgresDatabase
    clickhouse: ClickHouseDatabase
    parts: Sequence[Part]

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those that the settings name."""
        return cls(
            PostgresDatabase(settings),
            ItemsPostgresDatabase(settings),
            ClickHouseDatabase(settings),
            settings.parts,
        )


@dataclass(frozen=True)
class Queued:
    """Rows of the outbox of one source type in one state: pending, processing, completed, failed,
    or parked, which is failed for good.
    """

    source_type: str
    status: str
    rows: int


@dataclass(frozen=True)
class Failed:
    """A row of the outbox that failed. `last_error` holds no payload."""

    org_id: int
    source_type: str
    source_id: str
    status: str
    attempts: int
    failed_at: datetime
    last_error: str | None


@dataclass(frozen=True)
class Day:
    """How a day of a derived table compares with its sources.

    Args:
        stale: rows with other values, and rows that their source no longer makes.
        orphaned: rows whose source is gone; items are never, they outlive their spans.
        rejected: envelopes that cannot be stored; None for facts.
    """

    table: str
    day: date
    expected: int
    missing: int
    stale: int
    orphaned: int
    rejected: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Args:
        parts: the parts that are on. Of a part that is off there is neither a row nor a day.
        oldest_due: since when the oldest row of the outbox is due; None if nothing is.
        failures: the newest failed and parked rows.
        lag_seconds: by fact, how long the oldest source that is queued for it has been waiting.
        unknown: what could not be looked at, and why.
    """

    at: datetime
    parts: Sequence[Part]
    outbox: Sequence[Queued]
    oldest_due: datetime | None
    failures: Sequence[Failed]
    lag_seconds: dict[str, float]
    days: Sequence[Day]
    unknown: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The same, as JSON holds it: times in RFC 3339."""
        return to_jsonable_python(asdict(self))

    def rows(self, status: str) -> int:
        """Rows of the outbox in a state."""
        return sum(queued.rows for queued in self.outbox if queued.status == status)

    def total(self, what: str, *tables: str) -> int:
        """Rows over all days that are `missing`, `stale` or `orphaned`, in some tables."""
        return sum(getattr(day, what) for day in self.days if day.table in tables)


def diagnose(databases: Databases, days: int, log: Log) -> Diagnosis:
    """Look at the outbox, and compare the last `days` days, up to and with today.

    Raises:
        Refusal: `days` is out of range, or the database cannot be worked on.
        psycopg.Error: the database went away.
    """
    if not 1 <= days <= MOST_DAYS:
        expected = f"a whole number from 1 to {MOST_DAYS}"
        raise Refusal(
            f"days: expected {expected}, got {days}",
            errors=(FieldError(("days",), f"expected {expected}"),),
        )
    now = datetime.now(UTC)
    last = now.date()
    first = last - timedelta(days=days - 1)
    diagnosis = Diagnosis(now, databases.parts, [], None, [], {}, [], [])
    if "reporting" in databases.parts:
        diagnosis = _look_at_reporting(diagnosis, databases.reporting, first, last, log)
    if "items" in databases.parts:
        unknown: list[str] = []
        items = list(_items(databases, first, last, log, unknown))
        diagnosis = replace(diagnosis, days=[*diagnosis.days, *items], unknown=unknown)
    return diagnosis


def _look_at_reporting(
    diagnosis: Diagnosis, postgres: PostgresDatabase, first: date, last: date, log: Log
) -> Diagnosis:
    with postgres.connect() as connection:
        prepare(connection)
        log("Looking at the outbox")
        outbox = _outbox(connection)
        waiting = _waiting(connection)
        return replace(
            diagnosis,
            outbox=outbox,
            days=list(_facts(connection, first, last, log)),
            oldest_due=find_due(connection).oldest,
            failures=_failures(connection),
            lag_seconds={
                fact.table: max(waiting.get(source.type, 0.0) for source in fact.sources)
                for fact in FACTS
            },
        )


def _outbox(connection: Connection) -> list[Queued]:
    with connection.cursor(row_factory=class_row(Queued)) as cursor:
        return cursor.execute(
            "SELECT source_type, CASE WHEN status = 'failed' AND next_attempt_at = 'infinity'"
            " THEN 'parked' ELSE status END AS status, count(*) AS rows"
            " FROM reporting_outbox GROUP BY 1, 2 ORDER BY 1, 2"
        ).fetchall()


def _failures(connection: Connection) -> list[Failed]:
    with connection.cursor(row_factory=class_row(Failed)) as cursor:
        return cursor.execute(
            "SELECT org_id, source_type, source_id,"
            " CASE WHEN next_attempt_at = 'infinity' THEN 'parked' ELSE status END AS status,"
            " attempts, greatest('epoch', least(updated_at, '9999-12-31Z')) AS failed_at,"
            " last_error"
            " FROM reporting_outbox WHERE status = 'failed'"
            " ORDER BY updated_at DESC, id LIMIT %s",
            [_FAILURES_SHOWN],
        ).fetchall()


def _waiting(connection: Connection) -> dict[str, float]:
    """By source type, for how many seconds the oldest row waits. Parked ones wait for a person."""
    rows = connection.execute(
        "SELECT source_type, greatest(0, extract(epoch FROM now() - min(greatest('epoch',"
        " CASE WHEN status = 'failed' THEN created_at ELSE next_attempt_at END))))::float8"
        " FROM reporting_outbox"
        " WHERE status IN ('pending', 'processing', 'failed') AND next_attempt_at < 'infinity'"
        " GROUP BY source_type"
    )
    return dict(rows.fetchall())


def _facts(connection: Connection, first: date, last: date, log: Log) -> Iterator[Day]:
    for fact in FACTS:
        log(f"Comparing {fact.table} with its sources, {first} to {last}")
        for day, state in compare_days(connection, fact, first, last).items():
            yield Day(
                fact.table,
                day,
                state.expected,
                state.missing,
                state.stale + state.superseded,
                state.orphaned,
            )


def _items(
    databases: Databases,
    first: date,
    last: date,
    log: Log,
    unknown: list[str],
) -> Iterator[Day]:
    if not databases.clickhouse.is_there():
        unknown.append("items: no spans are stored yet")
        return
    for day in _days(first, last):
        log(f"Comparing items with their spans, {day}")
        try:
            would = rebuild_day(databases.items, databases.clickhouse, day, log, dry_run=True)
        except (Refusal, ClickHouseFailure) as failure:
            unknown.append(f"items: {failure}")
            return
        except psycopg.Error as failure:
            # The server's message alone: its details quote rows.
            unknown.append(f"items: {failure.diag.message_primary or type(failure).__name__}")
            return
        yield Day(
            ITEMS,
            day,
            would.processed,
            would.inserted,
            would.refreshed,
            0,
            would.rejected + would.offloaded,
        )


def _days(first: date, last: date) -> list[date]:
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]
