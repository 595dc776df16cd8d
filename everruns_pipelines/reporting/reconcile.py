"""Days: compares the facts of a UTC day with their sources, and makes the day right.

"Is this day right?" has one answer, computed here for the asset, its checks and the diagnosis. The
sources of a day are those that happened on it, and those of the facts that stand in it: so a fact
that stands in the wrong day is found there, too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, transaction, tried_again
from everruns_pipelines.reporting.catalog import SESSION, Fact, Source
from everruns_pipelines.reporting.projector import (
    Failure,
    Outcome,
    lock_sessions,
    project_selection,
    stage,
)
from everruns_pipelines.reporting.query import (
    EVERYTHING,
    STAGED,
    expected_rows,
    projected_rows,
    selected_rows,
)

# Sources per transaction: a day of any size is worked off in steps that others can wait for.
_STEP = 20_000
_WORK_MEM = "64MB"


@dataclass(frozen=True)
class DayState:
    """How the facts of a day compare with their sources.

    Args:
        expected: rows that the sources make.
        missing: of those, rows that are not there.
        stale: of those, rows with other values.
        superseded: rows whose source stands, but no longer makes them.
        orphaned: rows whose source is gone, and not archived either.
    """

    expected: int
    missing: int
    stale: int
    superseded: int
    orphaned: int


@dataclass
class DayReport:
    """What materializing a day did: `projector.COUNTS`, and the orphans that are left."""

    counts: Counter[str] = field(default_factory=Counter[str])
    failures: list[Failure] = field(default_factory=list[Failure])


def stage_days(connection: Connection, fact: Fact, first: date, last: date) -> None:
    """Find the sources of the days from `first` to `last`, both included, in one pass.

    They are kept in the temporary table `day_sources` until the connection is closed.
    """
    connection.execute("DROP TABLE IF EXISTS pg_temp.day_sources")
    connection.execute(
        sql.SQL(_DAY_SOURCES).format(
            sources=sql.SQL(" UNION ").join(
                [*(_sources_between(fact, source) for source in fact.sources), _behind(fact)]
            )
        ),
        {"first": first, "last": last},
    )
    connection.execute("CREATE INDEX ON pg_temp.day_sources (day, number)")
    connection.execute("ANALYZE pg_temp.day_sources")


def compare_day(connection: Connection, fact: Fact, day: date) -> DayState:
    """Compare one of the staged days with its sources; writes nothing."""
    with transaction(connection, work_mem=_WORK_MEM):
        staged = _stage_day(connection, day)
        compared = Counter[str]()
        for projection in fact.projections:
            query = sql.SQL(_COMPARE).format(
                projected=projected_rows(fact, projection, STAGED),
                fact=sql.Identifier(fact.table),
                of_fact=_columns(fact, "fact"),
                of_projection=_columns(fact, "projected"),
            )
            row = connection.execute(query, {"first": 1, "last": staged}).fetchone()
            assert row is not None
            compared.update(dict(zip(("expected", "missing", "stale"), row, strict=True)))
        leftovers = _leftovers(connection, fact, day, staged)
    return DayState(
        expected=compared["expected"],
        missing=compared["missing"],
        stale=compared["stale"],
        superseded=leftovers["superseded"],
        orphaned=leftovers["orphaned"],
    )


def materialize_day(
    connection: Connection,
    fact: Fact,
    day: date,
    *,
    remove_orphans: bool = False,
    session_id: str | None = None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> DayReport:
    """Make one of the staged days right, whatever its state.

    Args:
        remove_orphans: remove facts whose source is gone; else they are counted only.
        session_id: remove the orphans of this session only.
        on_step: told how many of how many sources are done.
    """
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


def _project_step(connection: Connection, fact: Fact, day: date, start: int) -> Outcome:
    with transaction(connection, work_mem=_WORK_MEM):
        staged = _stage_day(connection, day, after=start, up_to=start + _STEP)
        projections = tuple((fact, projection) for projection in fact.projections)
        return project_selection(connection, projections, 1, staged)


def _remove(
    connection: Connection, fact: Fact, day: date, states: list[str], session_id: str | None
) -> tuple[int, int]:
    """Remove the leftovers in some states; how many, and how many are left."""
    with transaction(connection, work_mem=_WORK_MEM):
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
            "SELECT NULL AS source_type, org_id, source_id"
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
                sql.SQL("SELECT org_id, source_key FROM ({}) AS expected").format(
                    expected_rows(fact, projection, STAGED)
                )
                for projection in fact.projections
            ),
            sources=sql.SQL(" UNION ALL ").join(
                sql.SQL("SELECT {} AS type, id, org_id FROM ({}) AS source").format(
                    sql.Literal(source.type), selected_rows(source, (), EVERYTHING)
                )
                for source in fact.sources
            ),
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
        " WHERE {time} >= %(first)s::date AND {time} < %(last)s::date + 1"
    ).format(time=sql.Identifier(source.time), rows=selected_rows(source, event_types, EVERYTHING))


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
"""

_COMPARE = """
SELECT
    count(*),
    count(*) FILTER (WHERE fact.org_id IS NULL),
    count(*) FILTER (
        WHERE fact.org_id IS NOT NULL AND ({of_projection}) IS DISTINCT FROM ({of_fact})
    )
FROM ({projected}) AS projected
LEFT JOIN {fact} AS fact USING (org_id, source_key)
WHERE projected.rejected IS NULL
"""

_LEFTOVER = """
CREATE TEMPORARY TABLE leftover ON COMMIT DROP AS
WITH expected AS ({expected}),
sources AS ({sources})
SELECT
    fact.org_id,
    fact.source_key,
    fact.session_id,
    CASE
        WHEN EXISTS (
            SELECT FROM sources
            WHERE sources.type = key.type AND sources.id = key.id AND sources.org_id = fact.org_id
        ) THEN CASE
            WHEN EXISTS (
                SELECT FROM pg_temp.selection
                WHERE selection.source_id = key.id AND selection.org_id = fact.org_id
            ) THEN 'superseded'
            -- Not a source of the day when it was staged: a projector has just written this.
            ELSE 'later'
        END
        WHEN key.type = 'event' AND EXISTS (
            SELECT FROM archived_events WHERE archived_events.id = key.id
        ) THEN 'archived'
        ELSE 'orphaned'
    END AS state
FROM {fact} AS fact
CROSS JOIN LATERAL (
    SELECT
        split_part(fact.source_key, ':', 1) AS type,
        CASE
            WHEN pg_input_is_valid(split_part(fact.source_key, ':', 2), 'uuid')
                THEN split_part(fact.source_key, ':', 2)::uuid
        END AS id
) AS key
WHERE fact.time_bucket_day = %(day)s
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
