"""The statements that write facts: one writes all facts that a part of the selection makes.

A row of a source that feeds several facts is read once.
"""

from functools import cache
from typing import TypeAlias

from psycopg import sql

from everruns_pipelines.reporting.catalog import Fact, Projection
from everruns_pipelines.reporting.query import looked_up, rows_of_looked_up, staged_rows
from everruns_pipelines.reporting.selection import Facts

# All of one source.
Projections: TypeAlias = tuple[tuple[Fact, Projection], ...]

_LARGEST_BIGINT = 2**63 - 1
_KEY = (sql.Identifier("org_id"), sql.Identifier("source_key"))
_PARTS = ("made", "added", "written", "settled", "gone", "removed")


@cache
def writing(projections: Projections, facts: Facts) -> bytes:
    """What writes the sources from number $1 to $2.

    Each of its rows is a table, a day, how many rows were read, inserted, refreshed, removed,
    rejected and to be written, and a list of what cannot be stored: organization, id of the source,
    reason. Several rows of a table and day add up.

    NEW facts are inserted, and that is all: it fails if one of them stands, or cannot be stored.
    """
    if any(projection.supersedes for _, projection in projections):
        facts = max(facts, Facts.KNOWN)
    source = projections[0][1].source
    types = sorted({kind for _, projection in projections for kind in projection.event_types})
    names = [_names(fact, projection, facts) for fact, projection in projections]
    is_new = facts is Facts.NEW
    write, count = (_INSERT, _INSERTED) if is_new else (_PROJECT, _PROJECTED)
    parts = [sql.SQL(write).format(**of_part) for of_part in names]
    counts = [sql.SQL(count).format(**of_part) for of_part in names]
    remarks = [
        sql.SQL(_REMARKS).format(**of_part)
        for of_part, (_, projection) in zip(names, projections, strict=True)
        if projection.rejects or projection.reports
    ]
    if remarks:
        parts.append(sql.SQL(_NOTE).format(remarks=sql.SQL(" UNION ALL ").join(remarks)))
        counts.append(sql.SQL(_REJECTED).format(read=sql.SQL("count(*)" if is_new else "0")))
    text = sql.SQL("WITH {looked_up}, {parts} {counts}").format(
        looked_up=looked_up(source, types),
        parts=sql.SQL(", ").join(parts),
        counts=sql.SQL(" UNION ALL ").join(counts),
    )
    statement = text.as_bytes(None).replace(b"%(first)s", b"$1").replace(b"%(last)s", b"$2")
    return statement.replace(b"%%", b"%")


def trying(fact: Fact, projection: Projection) -> tuple[sql.Composed, sql.Composed]:
    """What makes the rows of the sources from `first` to `last`, and what tries each of them.

    What became of each stands in the temporary table `tried`: `failed_state`, `failed_name`.
    """
    columns = [sql.Identifier(column.name) for column in fact.columns]
    make = sql.SQL(_TRIED).format(
        projected=staged_rows(fact, projection),
        unstorable=_unstorable(fact),
    )
    try_singly = sql.SQL(_TRY_SINGLY).format(
        fact=sql.Identifier(fact.table),
        columns=sql.SQL(", ").join(columns),
        values=sql.SQL(", ").join(sql.SQL("tried.{}").format(name) for name in columns),
        refresh=_refresh(columns),
    )
    return make, try_singly


def _names(fact: Fact, projection: Projection, facts: Facts) -> dict[str, sql.Composable]:
    """What the texts below name of one projection."""
    columns = [sql.Identifier(column.name) for column in fact.columns]
    names: dict[str, sql.Composable] = {
        part: sql.Identifier(f"{projection.name}_{part}") for part in _PARTS
    }
    names |= {
        "fact": sql.Identifier(fact.table),
        "name": sql.Literal(fact.table),
        "columns": sql.SQL(", ").join(columns),
        "of_fact": sql.SQL(", ").join(sql.SQL("fact.{}").format(name) for name in columns),
        "of_projection": sql.SQL(", ").join(
            sql.SQL("projected.{}").format(name) for name in columns
        ),
        "refresh": _refresh(columns),
        "unstorable": _unstorable(fact),
        "is_added": sql.SQL("seen_at IS NULL" if facts is Facts.KNOWN else "false"),
        "projected": rows_of_looked_up(fact, projection),
        "kept": sql.SQL("" if projection.aggregates else "NOT"),
        "superseded": sql.SQL(projection.supersedes or "false"),
    }
    has_notes = projection.rejects or projection.reports
    return names | {
        "settle": sql.SQL(_SETTLE if has_notes else "").format(**names),
        "find_gone": sql.SQL(_GONE if projection.supersedes else "").format(**names),
        "remove": sql.SQL(_REMOVE if projection.supersedes else _REMOVE_NOTHING).format(**names),
    }


def _refresh(columns: list[sql.Identifier]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{0} = excluded.{0}").format(name) for name in columns if name not in _KEY
    )


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


# New facts, as fast as can be: they are made where they are written, and not kept. Those that are
# rejected or reported are made again.
_INSERT = """
{made} AS {kept} MATERIALIZED ({projected}),
{added} AS (
    INSERT INTO {fact} AS fact ({columns}, projected_at)
    SELECT {columns}, now()
    FROM {made}
    WHERE rejected IS NULL
    RETURNING fact.time_bucket_day AS day
)
"""

_INSERTED = """
SELECT {name}, day::text, count(*), count(*), 0::bigint, 0::bigint, 0::bigint, count(*), NULL::jsonb
FROM {added}
GROUP BY day
"""

_PROJECT = """
{made} AS MATERIALIZED (
    SELECT
        projected.*,
        {unstorable} AS unstorable,
        fact.projected_at AS seen_at,
        projected.rejected IS NULL
            AND ({of_projection}) IS DISTINCT FROM ({of_fact}) AS wanted
    FROM ({projected}) AS projected
    -- LIMIT: looked up row by row. Left to choose, the planner may read the whole table. ANY, since
    -- only the index of the key has this order: while a table is small, any index would do.
    LEFT JOIN LATERAL (
        SELECT * FROM {fact} AS stored
        WHERE stored.org_id = projected.org_id
            AND stored.source_key = ANY (ARRAY[projected.source_key])
        ORDER BY stored.source_key
        LIMIT 1
    ) AS fact ON true
),
-- New facts, as fast as can be. Fails if somebody else has just written one of them.
{added} AS (
    INSERT INTO {fact} AS fact ({columns}, projected_at)
    SELECT {columns}, now()
    FROM {made}
    WHERE wanted AND unstorable IS NULL AND {is_added}
    ORDER BY org_id, source_key
    RETURNING fact.time_bucket_day AS day
),
{written} AS (
    INSERT INTO {fact} AS fact ({columns}, projected_at)
    SELECT {columns}, coalesce(seen_at, now())
    FROM {made}
    WHERE wanted AND unstorable IS NULL AND NOT ({is_added})
    ORDER BY org_id, source_key
    ON CONFLICT (org_id, source_key) DO UPDATE
    SET {refresh}, projected_at = now()
    -- `excluded` carries when the row that we compared was written: is it still that one?
    WHERE fact.projected_at = excluded.projected_at
    RETURNING new.time_bucket_day AS day, old.org_id IS NULL AS is_new
),
{settle}
{find_gone}
{removed} AS ({remove})
"""

_PROJECTED = """
SELECT
    {name},
    time_bucket_day::text,
    count(*),
    0::bigint,
    0::bigint,
    0::bigint,
    0::bigint,
    count(*) FILTER (WHERE wanted AND unstorable IS NULL),
    jsonb_agg(
        jsonb_build_array(org_id, split_part(source_key, ':', 2), unstorable)
    ) FILTER (WHERE rejected IS NULL AND unstorable IS NOT NULL)
FROM {made}
GROUP BY time_bucket_day
UNION ALL
SELECT {name}, day::text, 0, count(*), 0, 0, 0, 0, NULL FROM {added} GROUP BY day
UNION ALL
SELECT
    {name},
    day::text,
    0,
    count(*) FILTER (WHERE is_new),
    count(*) FILTER (WHERE NOT is_new),
    0,
    0,
    0,
    NULL
FROM {written}
GROUP BY day
UNION ALL
SELECT {name}, day::text, 0, 0, 0, count(*), 0, 0, NULL FROM {removed} GROUP BY day
"""

# What is rejected, or written as something else than the source says.
_REMARKS = """
SELECT {name} AS fact, org_id, source_key, session_id, time_bucket_day AS day, rejected, reported
FROM {made}
WHERE coalesce(rejected, reported) IS NOT NULL
"""

_NOTE = """
remarks AS MATERIALIZED ({remarks}),
noted AS (
    INSERT INTO everruns_pipelines.fact_rejections AS known
        (fact, org_id, source_key, session_id, reason, written)
    SELECT fact, org_id, source_key, session_id, coalesce(rejected, reported), rejected IS NULL
    FROM remarks
    ON CONFLICT (fact, org_id, source_key) DO UPDATE
    SET session_id = excluded.session_id,
        reason = excluded.reason,
        written = excluded.written,
        rejected_at = now()
    WHERE (known.reason, known.written) IS DISTINCT FROM (excluded.reason, excluded.written)
)
"""

_REJECTED = """
SELECT fact, day::text, {read}, 0, 0, 0, count(*), 0, NULL
FROM remarks
WHERE rejected IS NOT NULL
GROUP BY fact, day
"""

_SETTLE = """
{settled} AS (
    DELETE FROM everruns_pipelines.fact_rejections AS known
    USING {made} AS made
    WHERE known.fact = {name}
        AND known.org_id = made.org_id
        AND known.source_key = made.source_key
        AND coalesce(made.rejected, made.reported) IS NULL
        -- Asked once: most facts have nothing on record, and need not look row by row.
        AND EXISTS (SELECT FROM everruns_pipelines.fact_rejections WHERE fact = {name})
),
"""

# By arrays of keys: joined, a plan made while the table is small would read all of it ever after.
# Not by place: a row that somebody else writes meanwhile has another one then, and would stay.
_REMOVE = """
    DELETE FROM {fact} AS fact
    WHERE fact.org_id = ANY (ARRAY(SELECT org_id FROM {gone}))
        AND fact.source_key = ANY (ARRAY(SELECT source_key FROM {gone}))
        AND ROW (fact.org_id, fact.source_key)
            = ANY (ARRAY(SELECT ROW (org_id, source_key) FROM {gone}))
    RETURNING fact.time_bucket_day AS day
"""

# OFFSET: looked up source by source. Statistics that lag behind a growing table would have the
# planner read all of it. ORDER: by the index of sessions, see above.
_GONE = """
{gone} AS MATERIALIZED (
    SELECT stored.org_id, stored.source_key
    FROM pg_temp.selection AS source
    JOIN sessions AS session
        ON session.id = source.source_id AND (session.org_id = source.org_id) IS TRUE
    CROSS JOIN LATERAL (
        SELECT fact.org_id, fact.source_key
        FROM {fact} AS fact
        WHERE {superseded}
        ORDER BY fact.session_id
        OFFSET 0
    ) AS stored
    WHERE source.part BETWEEN %(first)s AND %(last)s
        AND NOT EXISTS (
            SELECT FROM {made} AS made
            WHERE made.org_id = stored.org_id AND made.source_key = stored.source_key
        )
),
"""

_REMOVE_NOTHING = "SELECT NULL::date AS day WHERE false"

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
