"""Applies projections to a selection of sources: writes what differs, and tells what it did.

The selection is staged in the temporary table `selection`, numbered, so that any part of it can be
projected again. Everything happens in the caller's transaction.

There are three ways to write facts, each dearer than the one before. New ones are inserted, and
that is all. Where some may stand already, what stands is compared, and what differs is written.
Where others write new facts of the same sources at the same time, each is written as if it stood.
The first two end where a fact stands that was not expected: then the next one is tried.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.raw_cursor import RawCursor
from psycopg.types.numeric import Int4

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SESSION, Fact, Projection, Source
from everruns_pipelines.reporting.query import STAGED, projected_rows, rows_of

# Sessions can lose rows. Whoever projects them reads them only after the one before has committed:
# else an older state of a session could bring back what a newer one has removed.
_SESSIONS_LOCK = 0x6576_7270_7365_7373
_LARGEST_BIGINT = 2**63 - 1
_KEY = (sql.Identifier("org_id"), sql.Identifier("source_key"))

# What a row can do to its own statement: bad values (22), violated constraints (23), an index entry
# that is too large (54). Everything else concerns the server, not the row.
_ROW_ERRORS = ("22", "23", "54")


@dataclass(frozen=True)
class Failure:
    """A source row whose facts cannot be stored, and why. Holds no value of the row."""

    org_id: int
    source_id: str
    reason: str


@dataclass
class Outcome:
    """What a projection did: per fact table and UTC day, counts under the names in `COUNTS`.

    Days are text, as PostgreSQL writes them: it knows days that Python's calendar lacks.
    """

    counts: dict[tuple[str, str], Counter[str]] = field(
        default_factory=dict[tuple[str, str], Counter[str]]
    )
    failures: list[Failure] = field(default_factory=list[Failure])

    def add(self, other: "Outcome") -> None:
        """Take in what another part of the selection did."""
        for key, counts in other.counts.items():
            self.counts.setdefault(key, Counter()).update(counts)
        self.failures += other.failures


COUNTS = ("read", "inserted", "refreshed", "unchanged", "removed", "rejected")


def projections_of(
    source: Source, facts: Sequence[Fact] = FACTS
) -> tuple[tuple[Fact, Projection], ...]:
    """The projections that read `source` and write one of `facts`."""
    return tuple(
        (fact, projection)
        for fact in facts
        for projection in fact.projections
        if projection.source is source
    )


class Facts(IntEnum):
    """Which facts of the selection may stand already: in the order in which it is tried."""

    NEW = 0
    KNOWN = 1
    CONTESTED = 2


@dataclass(frozen=True)
class Part:
    """Sources of one type that lie together in the selection, from number `first` to `last`."""

    source_type: str
    facts: Facts
    first: int
    last: int


def stage(connection: Connection, rows: sql.Composable, parameters: dict[str, Any]) -> int:
    """Make the selection out of a query for `source_type`, `org_id` and `source_id`.

    It lasts until the end of the transaction, numbered from 1, those of one type together.

    Returns:
        How many sources it holds.
    """
    known = sql.SQL("SELECT *, false AS is_new, false AS is_apart FROM ({}) AS rows").format(rows)
    staged = sum(part.last - part.first + 1 for part in stage_parts(connection, known, parameters))
    connection.execute("ANALYZE pg_temp.selection (part, event_type)")
    return staged


def stage_parts(
    connection: Connection, rows: sql.Composable, parameters: dict[str, Any]
) -> list[Part]:
    """Make the selection out of a query that also tells `is_new`, whether the source can be
    expected to have no facts yet, and `is_apart`, whether it is kept apart from the others.

    No statistics are taken: so statements on it keep their plans.
    """
    connection.execute(
        "CREATE TEMPORARY TABLE IF NOT EXISTS selection"
        " (part integer, source_type text, org_id bigint, source_id uuid, event_type text,"
        " is_new boolean, is_apart boolean) ON COMMIT DELETE ROWS"
    )
    connection.execute("DELETE FROM pg_temp.selection")
    statement = sql.SQL(_STAGE).format(events=rows_of(EVENT), rows=rows)
    staged = connection.execute(statement, parameters, prepare=True)
    return [
        Part(source_type, Facts.NEW if is_new else Facts.KNOWN, first, last)
        for source_type, is_new, first, last in staged
    ]


def lock_sessions(connection: Connection) -> None:
    """Wait for whoever projects sessions, and let nobody else until the transaction ends."""
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_SESSIONS_LOCK])


def try_lock_sessions(connection: Connection) -> bool:
    """Let nobody else project sessions until the transaction ends, unless somebody is at it."""
    row = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_SESSIONS_LOCK]).fetchone()
    return row == (True,)


def project_selection(
    connection: Connection,
    projections: Iterable[tuple[Fact, Projection]],
    first: int,
    last: int,
    *,
    facts: Facts = Facts.KNOWN,
) -> Outcome:
    """Project the sources numbered `first` to `last` of the selection, each wholly or not at all.

    Sources whose facts cannot be stored are among the failures; their neighbours are written.

    Args:
        facts: which of their facts may stand already.
    """
    if first > last:
        return Outcome()
    projections = tuple(projections)
    if any(projection.source is SESSION for _, projection in projections):
        lock_sessions(connection)
    at_work = projections[0]
    try:
        with connection.transaction() as savepoint:
            outcome = Outcome()
            for at_work in projections:
                outcome.add(_project(connection, *at_work, first, last, facts))
            if outcome.failures:
                raise psycopg.Rollback(savepoint)
    except psycopg.Error as error:
        if isinstance(error, psycopg.errors.UniqueViolation) and facts is not Facts.CONTESTED:
            return project_selection(connection, projections, first, last, facts=Facts(facts + 1))
        if not (error.sqlstate or "").startswith(_ROW_ERRORS):
            raise
        failures = _found_singly(connection, *at_work, first, last)
        if not failures and first < last:
            # It is not the writing that fails, but what is to be written cannot be told.
            middle = (first + last) // 2
            outcome = project_selection(connection, projections, first, middle, facts=facts)
            outcome.add(project_selection(connection, projections, middle + 1, last, facts=facts))
            return outcome
        outcome = Outcome(failures=failures or _failed(connection, first, error))
    if not outcome.failures:
        return outcome
    _unselect(connection, outcome.failures, first, last)
    remaining = project_selection(connection, projections, first, last, facts=facts)
    remaining.failures += outcome.failures
    return remaining


def _failed(connection: Connection, part: int, error: psycopg.Error) -> list[Failure]:
    rows = connection.execute(
        "SELECT org_id, source_id::text FROM pg_temp.selection WHERE part = %s", [part]
    )
    about = error.diag.constraint_name or error.diag.column_name
    return [
        Failure(org_id, source_id, _reason(error.sqlstate or "", about))
        for org_id, source_id in rows
    ]


def _found_singly(
    connection: Connection, fact: Fact, projection: Projection, first: int, last: int
) -> list[Failure]:
    """Which sources have rows of one fact that cannot be stored: each row is tried, none stays.

    Without a source being projected twice: the rows are made once, and tried on the server.
    """
    columns = [sql.Identifier(column.name) for column in fact.columns]
    try:
        with connection.transaction() as savepoint:
            connection.execute(
                sql.SQL(_TRIED).format(
                    projected=projected_rows(fact, projection, STAGED), unstorable=_unstorable(fact)
                ),
                {"first": first, "last": last},
            )
            connection.execute(
                sql.SQL(_TRY_SINGLY).format(
                    fact=sql.Identifier(fact.table),
                    columns=sql.SQL(", ").join(columns),
                    values=sql.SQL(", ").join(sql.SQL("tried.{}").format(name) for name in columns),
                    refresh=sql.SQL(", ").join(
                        sql.SQL("{0} = excluded.{0}").format(name)
                        for name in columns
                        if name not in _KEY
                    ),
                )
            )
            failed = connection.execute(
                "SELECT DISTINCT ON (org_id, split_part(source_key, ':', 2))"
                " org_id, split_part(source_key, ':', 2), failed_state, failed_name"
                " FROM pg_temp.tried WHERE failed_state IS NOT NULL"
            ).fetchall()
            raise psycopg.Rollback(savepoint)
    except psycopg.Error as error:
        if not (error.sqlstate or "").startswith(_ROW_ERRORS):
            raise
        return []
    return [Failure(org_id, id_, _reason(state, name)) for org_id, id_, state, name in failed]


def _reason(sqlstate: str, about: str | None) -> str:
    """What failed. The primary message of these errors can quote the value; its name cannot."""
    name = psycopg.errors.lookup(sqlstate).__name__
    return f"{name}: {about}" if about else name


def _unselect(connection: Connection, failures: list[Failure], first: int, last: int) -> None:
    connection.execute(
        "DELETE FROM pg_temp.selection USING unnest(%s::bigint[], %s::uuid[]) AS failed (org, id)"
        " WHERE part BETWEEN %s AND %s AND org_id = failed.org AND source_id = failed.id",
        [
            [failure.org_id for failure in failures],
            [failure.source_id for failure in failures],
            first,
            last,
        ],
    )


def _project(
    connection: Connection, fact: Fact, projection: Projection, first: int, last: int, facts: Facts
) -> Outcome:
    """Write one projection of a part of the selection.

    A row that somebody else wrote since we compared it is left alone and compared again: so an
    older state of a source never overwrites a newer one, and no update is lost.
    """
    statement = _statement(fact, projection, facts)
    written: Counter[tuple[str, str]] = Counter()
    while True:
        outcome = Outcome()
        contested = 0
        # Prepared where the connection allows it: planning takes as long as projecting 100 rows.
        rows = RawCursor(connection).execute(statement, [Int4(first), Int4(last)], prepare=True)
        for row in rows:
            day, read, inserted, refreshed, removed, rejected, wanted, unstorable = row
            contested += wanted - inserted - refreshed
            written["inserted", day] += inserted
            written["refreshed", day] += refreshed
            written["removed", day] += removed
            counts = Counter(
                read=read,
                inserted=written["inserted", day],
                refreshed=written["refreshed", day],
                removed=written["removed", day],
                rejected=rejected,
            )
            counts["unchanged"] = (
                read - rejected - counts["inserted"] - counts["refreshed"] - len(unstorable or ())
            )
            outcome.counts[fact.table, day] = counts
            outcome.failures += [Failure(*failure) for failure in unstorable or ()]
        if not contested:
            return outcome


@cache
def _statement(fact: Fact, projection: Projection, facts: Facts) -> bytes:
    """What writes the sources from number $1 to $2."""
    if facts is Facts.NEW and projection.supersedes:
        facts = Facts.KNOWN
    composed = (
        _insertion(fact, projection)
        if facts is Facts.NEW
        else _comparison(fact, projection, is_contested=facts is Facts.CONTESTED)
    )
    text = composed.as_bytes(None)
    return text.replace(b"%(first)s", b"$1").replace(b"%(last)s", b"$2").replace(b"%%", b"%")


def _insertion(fact: Fact, projection: Projection) -> sql.Composed:
    return sql.SQL(_INSERT).format(
        projected=projected_rows(fact, projection, STAGED),
        unstorable=_unstorable(fact),
        fact=sql.Identifier(fact.table),
        columns=sql.SQL(", ").join(sql.Identifier(column.name) for column in fact.columns),
        noted=_noted(fact, _NOTED) if projection.rejects or projection.reports else sql.SQL(""),
    )


def _comparison(fact: Fact, projection: Projection, *, is_contested: bool) -> sql.Composed:
    columns = [sql.Identifier(column.name) for column in fact.columns]
    return sql.SQL(_PROJECT).format(
        projected=projected_rows(fact, projection, STAGED),
        unstorable=_unstorable(fact),
        fact=sql.Identifier(fact.table),
        name=sql.Literal(fact.table),
        columns=sql.SQL(", ").join(columns),
        of_fact=sql.SQL(", ").join(sql.SQL("fact.{}").format(column) for column in columns),
        of_projection=sql.SQL(", ").join(
            sql.SQL("projected.{}").format(column) for column in columns
        ),
        refresh=sql.SQL(", ").join(
            sql.SQL("{0} = excluded.{0}").format(column) for column in columns if column not in _KEY
        ),
        added=sql.SQL(_NO_DAY if is_contested else _ADDED).format(
            fact=sql.Identifier(fact.table), columns=sql.SQL(", ").join(columns)
        ),
        is_not_added=sql.SQL("true" if is_contested else "seen_at IS NOT NULL"),
        noted=_noted(fact, _NOTED + _SETTLED)
        if projection.rejects or projection.reports
        else sql.SQL(""),
        removed=sql.SQL(_REMOVED if projection.supersedes else _NO_DAY).format(
            fact=sql.Identifier(fact.table), superseded=sql.SQL(projection.supersedes or "")
        ),
    )


def _noted(fact: Fact, text: LiteralString) -> sql.Composed:
    return sql.SQL(text).format(name=sql.Literal(fact.table))


def _unstorable(fact: Fact) -> sql.Composed:
    """Says which sum is beyond what its column holds."""
    return sql.SQL("CASE {} END").format(
        sql.SQL(" ").join(
            sql.SQL("WHEN {} > {} THEN {}").format(
                sql.Identifier("projected", column.name),
                sql.Literal(_LARGEST_BIGINT),
                sql.Literal(f"{column.name} is beyond bigint"),
            )
            for column in fact.columns
            if column.type == "bigint"
        )
    )


_STAGE = """
WITH staged AS (
    INSERT INTO pg_temp.selection
        (part, source_type, org_id, source_id, event_type, is_new, is_apart)
    SELECT
        row_number() OVER (
            ORDER BY source_type COLLATE "C", is_new, is_apart, org_id, source_id
        ),
        source_type,
        org_id,
        source_id,
        -- Known here, each projection looks up the events of its own types only.
        (SELECT event_type FROM {events} AS event WHERE id = source_id),
        is_new,
        is_apart
    FROM (
        SELECT
            source_type,
            org_id,
            source_id,
            bool_and(is_new) AS is_new,
            bool_or(is_apart) AS is_apart
        FROM ({rows}) AS rows
        GROUP BY 1, 2, 3
    ) AS selected
    RETURNING part, source_type, is_new, is_apart
)
SELECT source_type, is_new, min(part), max(part)
FROM staged
GROUP BY source_type, is_new, is_apart
"""

# New facts, as fast as can be. Fails if one of them stands already.
_INSERT = """
WITH compared AS MATERIALIZED (
    SELECT projected.*, {unstorable} AS unstorable FROM ({projected}) AS projected
),
{noted}
added AS (
    INSERT INTO {fact} AS fact ({columns}, projected_at)
    SELECT {columns}, now()
    FROM compared
    WHERE rejected IS NULL AND unstorable IS NULL
    ORDER BY org_id, source_key
    RETURNING fact.time_bucket_day AS day
)
SELECT
    day::text,
    coalesce(inserted, 0) + coalesce(odd, 0),
    coalesce(inserted, 0),
    0,
    0,
    coalesce(rejected, 0),
    coalesce(inserted, 0),
    unstorable
FROM (SELECT day, count(*) AS inserted FROM added GROUP BY 1) AS added
FULL JOIN (
    SELECT
        time_bucket_day AS day,
        count(*) AS odd,
        count(*) FILTER (WHERE rejected IS NOT NULL) AS rejected,
        jsonb_agg(
            jsonb_build_array(org_id, split_part(source_key, ':', 2), unstorable)
        ) FILTER (WHERE rejected IS NULL) AS unstorable
    FROM compared
    WHERE rejected IS NOT NULL OR unstorable IS NOT NULL
    GROUP BY 1
) AS odd USING (day)
"""

_PROJECT = """
WITH compared AS MATERIALIZED (
    SELECT
        projected.*,
        {unstorable} AS unstorable,
        fact.projected_at AS seen_at,
        projected.rejected IS NULL
            AND ({of_projection}) IS DISTINCT FROM ({of_fact}) AS wanted
    FROM ({projected}) AS projected
    -- LIMIT: looked up by key, row by row. Left to choose, the planner may read the whole table.
    LEFT JOIN LATERAL (
        SELECT * FROM {fact} AS stored
        WHERE stored.org_id = projected.org_id AND stored.source_key = projected.source_key
        LIMIT 1
    ) AS fact ON true
),
added AS ({added}),
written AS (
    INSERT INTO {fact} AS fact ({columns}, projected_at)
    SELECT {columns}, coalesce(seen_at, now())
    FROM compared
    WHERE wanted AND unstorable IS NULL AND {is_not_added}
    ORDER BY org_id, source_key
    ON CONFLICT (org_id, source_key) DO UPDATE
    SET {refresh}, projected_at = now()
    -- `excluded` carries when the row that we compared was written: is it still that one?
    WHERE fact.projected_at = excluded.projected_at
    RETURNING new.time_bucket_day AS day, old.org_id IS NULL AS is_new
),
{noted}
removed AS ({removed})
SELECT
    day::text,
    coalesce(read, 0),
    coalesce(inserted, 0),
    coalesce(refreshed, 0),
    coalesce(gone, 0),
    coalesce(rejected, 0),
    coalesce(wanted, 0),
    unstorable
FROM (
    SELECT
        time_bucket_day AS day,
        count(*) AS read,
        count(*) FILTER (WHERE rejected IS NOT NULL) AS rejected,
        count(*) FILTER (WHERE wanted AND unstorable IS NULL) AS wanted,
        jsonb_agg(
            jsonb_build_array(org_id, split_part(source_key, ':', 2), unstorable)
        ) FILTER (WHERE rejected IS NULL AND unstorable IS NOT NULL) AS unstorable
    FROM compared
    GROUP BY 1
) AS compared
FULL JOIN (
    SELECT
        day,
        count(*) FILTER (WHERE is_new) AS inserted,
        count(*) FILTER (WHERE NOT is_new) AS refreshed
    FROM (SELECT * FROM written UNION ALL SELECT day, true FROM added) AS written
    GROUP BY 1
) AS written USING (day)
FULL JOIN (SELECT day, count(*) AS gone FROM removed GROUP BY 1) AS removed USING (day)
"""

# New facts, as fast as can be. Fails if somebody else has just written one of them.
_ADDED = """
    INSERT INTO {fact} AS fact ({columns}, projected_at)
    SELECT {columns}, now()
    FROM compared
    WHERE wanted AND unstorable IS NULL AND seen_at IS NULL
    ORDER BY org_id, source_key
    RETURNING fact.time_bucket_day AS day
"""

_NOTED = """
noted AS (
    INSERT INTO everruns_pipelines.fact_rejections AS known
        (fact, org_id, source_key, session_id, reason, written)
    SELECT {name}, org_id, source_key, session_id, coalesce(rejected, reported), rejected IS NULL
    FROM compared
    WHERE coalesce(rejected, reported) IS NOT NULL
    ON CONFLICT (fact, org_id, source_key) DO UPDATE
    SET session_id = excluded.session_id,
        reason = excluded.reason,
        written = excluded.written,
        rejected_at = now()
    WHERE (known.reason, known.written) IS DISTINCT FROM (excluded.reason, excluded.written)
),
"""

_SETTLED = """
settled AS (
    DELETE FROM everruns_pipelines.fact_rejections AS known
    USING compared
    WHERE known.fact = {name}
        AND known.org_id = compared.org_id
        AND known.source_key = compared.source_key
        AND coalesce(compared.rejected, compared.reported) IS NULL
        -- Asked once: most facts have nothing on record, and need not look row by row.
        AND EXISTS (SELECT FROM everruns_pipelines.fact_rejections WHERE fact = {name})
),
"""

_REMOVED = """
    DELETE FROM {fact} AS fact
    USING (
        SELECT stored.org_id, stored.source_key
        FROM pg_temp.selection AS source
        JOIN sessions AS session
            ON session.id = source.source_id AND session.org_id = source.org_id
        -- OFFSET: looked up source by source. Statistics that lag behind a growing table would
        -- have the planner read all of it.
        CROSS JOIN LATERAL (
            SELECT fact.org_id, fact.source_key FROM {fact} AS fact WHERE {superseded} OFFSET 0
        ) AS stored
        WHERE source.part BETWEEN %(first)s AND %(last)s
            AND NOT EXISTS (
                SELECT FROM compared
                WHERE compared.org_id = stored.org_id AND compared.source_key = stored.source_key
            )
    ) AS gone
    WHERE fact.org_id = gone.org_id AND fact.source_key = gone.source_key
    RETURNING fact.time_bucket_day AS day
"""

_NO_DAY = "SELECT NULL::date AS day WHERE false"

# What is tried singly, and what became of it.
_TRIED = """
CREATE TEMPORARY TABLE tried ON COMMIT DROP AS
SELECT *, NULL::text AS failed_state, NULL::text AS failed_name
FROM ({projected}) AS projected
WHERE rejected IS NULL AND {unstorable} IS NULL
"""

# Whether it can be stored or not: it is taken back.
_TRY_SINGLY = """
DO $try$
DECLARE
    tried record;
    state text;
    about_constraint text;
    about_column text;
BEGIN
    FOR tried IN SELECT ctid AS place, * FROM pg_temp.tried LOOP
        BEGIN
            INSERT INTO {fact} AS fact ({columns}) VALUES ({values})
            ON CONFLICT (org_id, source_key) DO UPDATE SET {refresh};
            RAISE SQLSTATE 'EV000';
        EXCEPTION
            WHEN SQLSTATE 'EV000' THEN
                NULL;
            WHEN data_exception OR integrity_constraint_violation OR program_limit_exceeded THEN
                GET STACKED DIAGNOSTICS
                    state = RETURNED_SQLSTATE,
                    about_constraint = CONSTRAINT_NAME,
                    about_column = COLUMN_NAME;
                UPDATE pg_temp.tried AS failed
                SET failed_state = state,
                    failed_name = coalesce(nullif(about_constraint, ''), nullif(about_column, ''))
                WHERE failed.ctid = tried.place;
        END;
    END LOOP;
END
$try$
"""
