"""Days: compares the facts of UTC days with their sources, and makes the days right.

"Is this day right?" has one answer, computed here for the asset, its checks and the diagnosis. A
range of days is first compared as a whole (`right_days`). Days that differ are compared row by row.

The sources of a day are those that happened on it, and those of the facts that stand in it: so a
fact that stands in the wrong day is found there, too.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import partial

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, transaction, tried_again
from everruns_pipelines.reporting.catalog import SESSION, Fact, Source
from everruns_pipelines.reporting.erasure import forget_sessions
from everruns_pipelines.reporting.projector import (
    Outcome,
    lock_sessions,
    project_selection,
    projections_of,
)
from everruns_pipelines.reporting.query import (
    BETWEEN,
    KEY_OF_FACT,
    selected_rows,
    staged_rows,
    stands,
)
from everruns_pipelines.reporting.right_days import WORK_MEM, days_between, right_days
from everruns_pipelines.reporting.selection import Failure, stage

# Sources per transaction: a day of any size is worked off in steps that others can wait for.
_STEP = 20_000

# How long a change may take to reach the facts: what nobody enqueued is looked for every few
# minutes.
GRACE = timedelta(minutes=15)


@dataclass(frozen=True)
class DayState:
    """How the facts of a day compare with their sources.

    Args:
        expected: rows that the sources make.
        missing: of those, rows that are not there.
        stale: of those, rows with other values.
        superseded: rows whose source stands, but no longer makes them.
        orphaned: rows whose source is gone: an archived event is not, unless its session is.
        underway: rows that would be missing or stale, but their source has only just changed, or
            waits in the outbox.
    """

    expected: int = 0
    missing: int = 0
    stale: int = 0
    superseded: int = 0
    orphaned: int = 0
    underway: int = 0


@dataclass
class DayReport:
    """What materializing a day did: `projector.COUNTS`, and the orphans that are left."""

    counts: Counter[str] = field(default_factory=Counter[str])
    failures: list[Failure] = field(default_factory=list[Failure])


def compare_days(
    connection: Connection, fact: Fact, first: date, last: date, grace: timedelta | None = None
) -> dict[date, DayState]:
    """Compare the facts of the days from `first` to `last`, both included; writes nothing.

    Args:
        grace: how long a change may take to reach the facts before it counts as missing or stale.
            None counts every difference, even that of a source which waits in the outbox.
    """
    right = right_days(connection, fact, first, last)
    states = {day: DayState(row.read - row.rejected) for day, row in right.items()}
    differing = [day for day in days_between(first, last) if day not in right]
    if differing:
        stage_days(connection, fact, differing)
    states |= {day: compare_day(connection, fact, day, grace) for day in differing}
    return dict(sorted(states.items()))


def materialize_days(
    connection: Connection,
    fact: Fact,
    first: date,
    last: date,
    *,
    remove_orphans: bool = False,
    session_id: str | None = None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[tuple[date, DayReport]]:
    """Make the days from `first` to `last` right, whatever their state, one after the other.

    Args:
        remove_orphans: remove facts whose source is gone; else they are counted only. What our own
            tables keep of sessions that are gone goes, too.
        session_id: remove the orphans of this session only.
        on_step: told how many of how many sources of a day are done.

    Yields:
        Each day once it is right and committed, with what was done.
    """
    right = {
        day: row for day, row in right_days(connection, fact, first, last).items() if row.is_noted
    }
    days = days_between(first, last)
    differing = [day for day in days if day not in right]
    if differing:
        stage_days(connection, fact, differing)
    for day in days:
        if day in right:
            row = right[day]
            unchanged = row.read - row.rejected
            yield (
                day,
                DayReport(Counter(read=row.read, unchanged=unchanged, rejected=row.rejected)),
            )
        else:
            yield (
                day,
                _materialize_day(
                    connection,
                    fact,
                    day,
                    remove_orphans=remove_orphans,
                    session_id=session_id,
                    on_step=on_step,
                ),
            )
    if remove_orphans:
        with transaction(connection):
            forget_sessions(connection, session_id)


def count_rows(
    connection: Connection, days: Collection[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """How many rows facts have on days, both by their names: a day is found by its index."""
    counts = dict.fromkeys(days, 0)
    for table in {table for table, _ in days}:
        rows = connection.execute(
            sql.SQL(
                "SELECT time_bucket_day::text, count(*) FROM {}"
                " WHERE time_bucket_day = ANY (%s::date[]) GROUP BY 1"
            ).format(sql.Identifier(table)),
            [[day for name, day in days if name == table]],
        )
        counts |= {(table, day): count for day, count in rows}
    return counts


def stretches(days: Collection[date]) -> Iterator[tuple[date, date]]:
    """The days as ranges without gaps, by their ends."""
    ordered = sorted(days)
    first = last = ordered[0]
    for day in ordered[1:]:
        if day - last > timedelta(days=1):
            yield first, last
            first = day
        last = day
    yield first, last


def compare_day(
    connection: Connection, fact: Fact, day: date, grace: timedelta | None = None
) -> DayState:
    """Compare one of the staged days with its sources, row by row."""
    with transaction(connection, work_mem=WORK_MEM):
        staged = _stage_day(connection, day)
        compared = Counter[str]()
        for projection in fact.projections:
            query = sql.SQL(_COMPARE).format(
                projected=staged_rows(fact, projection),
                fact=sql.Identifier(fact.table),
                of_fact=_columns(fact, "fact"),
                of_projection=_columns(fact, "projected"),
                changed=sql.Identifier("projected", fact.changed),
                type=sql.Literal(projection.source.type),
            )
            row = connection.execute(query, {"first": 1, "last": staged, "grace": grace}).fetchone()
            assert row is not None
            names = ("expected", "missing", "stale", "underway")
            compared.update(dict(zip(names, row, strict=True)))
        leftovers = _leftovers(connection, fact, day, staged)
    return DayState(
        expected=compared["expected"],
        missing=compared["missing"],
        stale=compared["stale"],
        underway=compared["underway"],
        superseded=leftovers["superseded"],
        orphaned=leftovers["orphaned"],
    )


def _materialize_day(
    connection: Connection,
    fact: Fact,
    day: date,
    *,
    remove_orphans: bool,
    session_id: str | None,
    on_step: Callable[[int, int], None],
) -> DayReport:
    """Make one of the staged days right."""
    report = DayReport()
    row = connection.execute(
        "SELECT count(*) FROM pg_temp.day_sources WHERE day = %s", [day]
    ).fetchone()
    assert row is not None
    total = int(row[0])
    for start in range(0, total, _STEP):
        # Beside projectors, which write the same rows in another order.
        outcome = tried_again(partial(_project_step, connection, fact, day, start))
        for counts in outcome.counts.values():
            report.counts.update(counts)
        report.failures += outcome.failures
        on_step(min(start + _STEP, total), total)
    states = ["superseded", "orphaned"] if remove_orphans else ["superseded"]
    removed, left = tried_again(partial(_remove, connection, fact, day, states, session_id))
    report.counts["removed"] += removed
    report.counts["orphaned"] = left
    return report


def stage_days(connection: Connection, fact: Fact, days: Sequence[date]) -> None:
    """Find the sources of these days, in one pass.

    They are kept in the temporary table `day_sources` until the connection is closed.
    """
    connection.execute("DROP TABLE IF EXISTS pg_temp.day_sources")
    connection.execute(
        sql.SQL(_DAY_SOURCES).format(
            sources=sql.SQL(" UNION ").join(
                [*(_sources_between(fact, source) for source in fact.sources), _behind(fact)]
            )
        ),
        {"first": min(days), "last": max(days), "days": list(days)},
    )
    connection.execute("CREATE INDEX ON pg_temp.day_sources (day, number)")
    connection.execute("ANALYZE pg_temp.day_sources")


def _project_step(connection: Connection, fact: Fact, day: date, start: int) -> Outcome:
    with transaction(connection, work_mem=WORK_MEM):
        staged = _stage_day(connection, day, after=start, up_to=start + _STEP)
        outcome = Outcome()
        for source in fact.sources:
            projections = projections_of(source, [fact])
            outcome.add(project_selection(connection, projections, 1, staged))
        return outcome


def _remove(
    connection: Connection, fact: Fact, day: date, states: list[str], session_id: str | None
) -> tuple[int, int]:
    """Remove the leftovers in some states; how many, and how many are left."""
    with transaction(connection, work_mem=WORK_MEM):
        staged = _stage_day(connection, day)
        if SESSION in fact.sources:
            # What a session has lost it may have again before the row is removed.
            lock_sessions(connection)
        leftovers = _leftovers(connection, fact, day, staged)
        removed = connection.execute(
            sql.SQL(_REMOVE).format(fact=sql.Identifier(fact.table), name=sql.Literal(fact.table)),
            {"states": states, "session_id": session_id},
        ).rowcount
    return removed, leftovers["superseded"] + leftovers["orphaned"] - removed


def _stage_day(
    connection: Connection, day: date, *, after: int = 0, up_to: int | None = None
) -> int:
    return stage(
        connection,
        sql.SQL(
            "SELECT org_id, source_id"
            " FROM pg_temp.day_sources WHERE day = %(day)s"
            " AND number > %(after)s AND (%(up_to)s::bigint IS NULL OR number <= %(up_to)s)"
        ),
        {"day": day, "after": after, "up_to": up_to},
    )


def _leftovers(connection: Connection, fact: Fact, day: date, staged: int) -> Counter[str]:
    """Facts of the day that no source makes, by why: kept in the temporary table `leftover`."""
    connection.execute("DROP TABLE IF EXISTS pg_temp.leftover")
    connection.execute(
        sql.SQL(_LEFTOVER).format(
            fact=sql.Identifier(fact.table),
            expected=sql.SQL(" UNION ALL ").join(
                sql.SQL(
                    "SELECT org_id, source_key FROM ({}) AS staged WHERE rejected IS NULL"
                ).format(staged_rows(fact, projection))
                for projection in fact.projections
            ),
            key=KEY_OF_FACT,
            stands=stands(fact.sources, "fact.org_id"),
        ),
        {"day": day, "first": 1, "last": staged},
    )
    rows = connection.execute("SELECT state, count(*) FROM pg_temp.leftover GROUP BY 1").fetchall()
    return Counter({str(state): int(count) for state, count in rows})


def _sources_between(fact: Fact, source: Source) -> sql.Composed:
    event_types = [
        event_type
        for projection in fact.projections
        if projection.source is source
        for event_type in projection.event_types
    ]
    return sql.SQL(
        "SELECT ({time} AT TIME ZONE 'UTC')::date AS day, org_id, id AS source_id"
        " FROM ({rows}) AS source"
    ).format(time=sql.Identifier(source.time), rows=selected_rows(source, event_types, BETWEEN))


def _behind(fact: Fact) -> sql.Composed:
    return sql.SQL(
        "SELECT time_bucket_day, org_id, split_part(source_key, ':', 2)::uuid FROM {fact}"
        " WHERE time_bucket_day BETWEEN %(first)s AND %(last)s"
        " AND pg_input_is_valid(split_part(source_key, ':', 2), 'uuid')"
    ).format(fact=sql.Identifier(fact.table))


def _columns(fact: Fact, relation: str) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(relation, column.name) for column in fact.columns)


_DAY_SOURCES = """
CREATE TEMPORARY TABLE day_sources AS
SELECT
    day,
    org_id,
    source_id,
    row_number() OVER (PARTITION BY day ORDER BY org_id, source_id) AS number
FROM ({sources}) AS sources
WHERE day = ANY (%(days)s)
"""

# OFFSET: the facts are looked up by key. Only of a row that differs is it asked whether that is
# underway.
_COMPARE = """
SELECT
    count(*),
    count(*) FILTER (WHERE is_missing AND NOT is_underway),
    count(*) FILTER (WHERE is_stale AND NOT is_underway),
    count(*) FILTER (WHERE is_underway)
FROM ({projected}) AS projected
LEFT JOIN LATERAL (
    SELECT * FROM {fact} AS fact
    WHERE fact.org_id = projected.org_id AND fact.source_key = projected.source_key
    OFFSET 0
) AS fact ON true
CROSS JOIN LATERAL (
    SELECT
        fact.org_id IS NULL AS is_missing,
        fact.org_id IS NOT NULL AND ({of_projection}) IS DISTINCT FROM ({of_fact}) AS is_stale
    OFFSET 0
) AS compared
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN %(grace)s::interval IS NULL OR NOT (is_missing OR is_stale) THEN false
        WHEN CASE WHEN is_missing THEN projected.created_at ELSE {changed} END
            BETWEEN now() - %(grace)s::interval AND now() THEN true
        ELSE EXISTS (
            SELECT FROM reporting_outbox AS outbox
            WHERE outbox.org_id = projected.org_id
                AND outbox.source_type = {type}
                AND outbox.source_id = split_part(projected.source_key, ':', 2)
                AND outbox.status <> 'completed'
                AND outbox.next_attempt_at < 'infinity'
        )
    END AS is_underway
    OFFSET 0
) AS progress
WHERE projected.rejected IS NULL
"""

_LEFTOVER = """
CREATE TEMPORARY TABLE leftover ON COMMIT DROP AS
WITH expected AS ({expected})
SELECT
    fact.org_id,
    fact.source_key,
    fact.session_id,
    CASE
        WHEN {stands} THEN CASE
            WHEN EXISTS (
                SELECT FROM pg_temp.selection
                WHERE selection.source_id = key.id AND selection.org_id = fact.org_id
            ) THEN 'superseded'
            -- Not a source of the day when it was staged: a projector has just written this.
            ELSE 'later'
        END
        ELSE 'orphaned'
    END AS state
FROM {fact} AS fact
{key}WHERE fact.time_bucket_day = %(day)s
    AND NOT EXISTS (
        SELECT FROM expected
        WHERE expected.org_id = fact.org_id AND expected.source_key = fact.source_key
    )
"""

_REMOVE = """
WITH removed AS (
    DELETE FROM {fact} AS fact
    USING pg_temp.leftover
    WHERE fact.org_id = leftover.org_id
        AND fact.source_key = leftover.source_key
        AND state = ANY (%(states)s)
        AND (
            state = 'superseded'
            OR %(session_id)s::uuid IS NULL
            OR leftover.session_id = %(session_id)s::uuid
        )
    RETURNING fact.org_id, fact.source_key
),
settled AS (
    DELETE FROM everruns_pipelines.fact_rejections AS known
    USING removed
    WHERE known.fact = {name}
        AND known.org_id = removed.org_id
        AND known.source_key = removed.source_key
)
SELECT FROM removed
"""
