"""What is wrong with the derived data, and how far behind it is: one answer for the commands
`diagnose` and `check` and for the asset `pipeline_health`. Repairs nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from everruns_pipelines.items.rebuild import GRACE as ITEMS_GRACE
from everruns_pipelines.items.rebuild import rebuild_day
from everruns_pipelines.reporting.backfill import Missing, look
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.reconcile import GRACE, compare_days, stretches
from everruns_pipelines.reporting.watch import find_due
from everruns_pipelines.settings import Part, Settings

MOST_DAYS = 366
# The outbox is drained within seconds, and what nobody enqueued is found within ten minutes.
MOST_LAG = timedelta(minutes=15)
ITEMS = "items"
NO_SPANS = "items: no spans are stored yet"
_WRONG = ("missing", "stale", "orphaned")
_FAILURES_SHOWN = 10

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
        underway: rows that are neither yet: their source has only just changed, or is queued.
        orphaned: rows whose source is gone; items are never, they outlive their spans.
        rejected: envelopes that cannot be stored; None for facts.
    """

    table: str
    day: date
    expected: int
    missing: int
    stale: int
    orphaned: int
    underway: int = 0
    rejected: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Args:
        parts: the parts that are on. Of a part that is off there is neither a row nor a day.
        oldest_due: since when the oldest row of the outbox is due; None if nothing is.
        failures: the newest failed and parked rows.
        lag_seconds: by fact, how long the oldest source that is queued for it has been waiting.
        anywhere: by source type, what a backfill would enqueue, of whatever age.
        days: the last days, and those of facts in which that look found something.
        unknown: what could not be looked at, and why.
    """

    at: datetime
    parts: Sequence[Part]
    outbox: Sequence[Queued]
    oldest_due: datetime | None
    failures: Sequence[Failed]
    lag_seconds: dict[str, float]
    anywhere: Mapping[str, Missing]
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

    @property
    def is_well(self) -> bool:
        """Nothing is wrong, and everything could be looked at."""
        return self.is_complete and not self.wrong()

    @property
    def is_complete(self) -> bool:
        """Everything that there is could be looked at."""
        return not set(self.unknown) - {NO_SPANS}

    def verdict(self) -> str:
        """What is wrong, and since when, in one line."""
        wrong = [f"{rows:,} {what}" for what, rows in self.wrong().items()]
        oldest = self.oldest_missing()
        if oldest is not None and wrong:
            wrong.append(f"the oldest since {oldest:%F %T} UTC")
        return "; ".join([*wrong, *self.unknown]) or "all is well"

    def summary(self) -> dict[str, Any]:
        """What is wrong: the counts, the days of each table that are wrong, and what to do."""
        wrong_days: dict[str, list[dict[str, Any]]] = {}
        for day in self.days:
            if rows := {what: getattr(day, what) for what in _WRONG if getattr(day, what)}:
                wrong_days.setdefault(day.table, []).append({"day": day.day, **rows})
        return to_jsonable_python(
            {
                "ok": self.is_well,
                "at": self.at,
                **self.counts(),
                "damaged": sum(found.damaged for found in self.anywhere.values()),
                "oldest_missing": self.oldest_missing(),
                "lag_seconds": max(self.lag_seconds.values(), default=0.0),
                "days": wrong_days,
                "unknown": self.unknown,
                "remedies": self.remedies(),
            }
        )

    def wrong(self) -> dict[str, int]:
        """How many rows of each kind somebody or something has to see to; empty if all is well.

        An orphan is not among them: it may be wanted.
        """
        return {what: rows for what, rows in self.counts().items() if rows and what != "orphaned"}

    def counts(self) -> dict[str, int]:
        """Rows that are missing, stale or orphaned, over all tables and days that were looked at;
        rows of the outbox that are parked; facts whose sources wait for too long.
        """
        everything = (*(fact.table for fact in FACTS), ITEMS)
        counts = {what: self.total(what, *everything) for what in _WRONG}
        if not counts["missing"] + counts["stale"]:
            # Those that lie on days that no calendar has.
            counts["missing"] = self._overdue()
        late = sum(lag > MOST_LAG.total_seconds() for lag in self.lag_seconds.values())
        return {**counts, "parked": self.rows("parked"), "late": late}

    def _overdue(self) -> int:
        """Sources that a backfill would enqueue, of the types of which one has waited for long."""
        return sum(
            found.sources
            for found in self.anywhere.values()
            if found.oldest is not None and self.at - found.oldest > GRACE
        )

    def oldest_missing(self) -> datetime | None:
        """Since when the oldest source lacks a fact, or has a stale one."""
        return min((one.oldest for one in self.anywhere.values() if one.oldest), default=None)

    def remedies(self) -> list[str]:
        """What to do about what was found, one command or sentence each."""
        counts = self.counts()
        facts = [fact.table for fact in FACTS]
        in_facts, in_items = (
            self.total("missing", *tables) + self.total("stale", *tables)
            for tables in (facts, [ITEMS])
        )
        found: list[str] = []
        backfills = bool(
            self._overdue() or (in_facts and any(one.sources for one in self.anywhere.values()))
        )
        if backfills:
            found.append("everruns-pipelines backfill --limit 10000")
        # A backfill compares few values: what is stale otherwise it leaves as it is.
        if in_facts and (not backfills or self.total("stale", *facts)):
            found.append("materialize these days of the facts: in the UI, or with `dg launch`")
        if in_items:
            found.append("materialize these days of the items: in the UI, or with `dg launch`")
        if counts["parked"]:
            found.append("everruns-pipelines unpark")
        if counts["late"]:
            found.append("start Dagster's daemon, or: everruns-pipelines project")
        if counts["orphaned"]:
            found.append(
                "orphans, if they are not wanted: everruns-pipelines erase --session-id S, "
                "or materialize the day with remove_orphans: true"
            )
        return found


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
    last_days = [now.date() - timedelta(days=ago) for ago in range(days - 1, -1, -1)]
    diagnosis = Diagnosis(now, databases.parts, [], None, [], {}, {}, [], [])
    if "reporting" in databases.parts:
        diagnosis = _look_at_reporting(diagnosis, databases.reporting, last_days, log)
    if "items" in databases.parts:
        unknown: list[str] = []
        items = list(_items(databases, last_days, log, unknown))
        diagnosis = replace(diagnosis, days=[*diagnosis.days, *items], unknown=unknown)
    return diagnosis


def _look_at_reporting(
    diagnosis: Diagnosis, postgres: PostgresDatabase, days: Sequence[date], log: Log
) -> Diagnosis:
    with postgres.connect() as connection:
        prepare(connection)
        log("Looking at the outbox")
        outbox = _outbox(connection)
        waiting = _waiting(connection)
        log("Looking for sources of any age whose facts are missing or stale")
        anywhere = look(connection)
        return replace(
            diagnosis,
            outbox=outbox,
            anywhere=anywhere,
            days=list(_facts(connection, anywhere, days, log)),
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
    """By source type, for how many seconds the oldest row has been due.

    Parked ones wait for a person, and what has failed for its next attempt.
    """
    rows = connection.execute(
        "SELECT source_type,"
        " greatest(0, extract(epoch FROM now() - min(greatest('epoch', next_attempt_at))))::float8"
        " FROM reporting_outbox"
        " WHERE status IN ('pending', 'processing', 'failed') AND next_attempt_at < 'infinity'"
        " GROUP BY source_type"
    )
    return dict(rows.fetchall())


def _facts(
    connection: Connection, anywhere: Mapping[str, Missing], days: Sequence[date], log: Log
) -> Iterator[Day]:
    for fact in FACTS:
        found = (day for source in fact.sources for day in anywhere[source.type].days)
        for first, last in stretches({*days, *found}):
            log(f"Comparing {fact.table} with its sources, {first} to {last}")
            for day, state in compare_days(connection, fact, first, last, GRACE).items():
                yield Day(
                    fact.table,
                    day,
                    state.expected,
                    state.missing,
                    state.stale + state.superseded,
                    state.orphaned,
                    state.underway,
                )


def _items(
    databases: Databases, days: Sequence[date], log: Log, unknown: list[str]
) -> Iterator[Day]:
    if not databases.clickhouse.is_there():
        unknown.append(NO_SPANS)
        return
    for day in days:
        log(f"Comparing items with their spans, {day}")
        try:
            would = rebuild_day(
                databases.items, databases.clickhouse, day, log, dry_run=True, grace=ITEMS_GRACE
            )
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
            would.processed + would.underway,
            would.inserted,
            would.stale,
            0,
            would.underway,
            rejected=would.rejected + would.offloaded,
        )
