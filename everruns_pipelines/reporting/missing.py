"""Finds every source that lacks a fact, has a stale one, or one too many. See docs/backfill.md.

Facts of events are by far the most. Of these, keys are looked up only in sessions that differ.
"""

from collections.abc import Collection, Iterable
from typing import Any, LiteralString

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SESSION, Fact, Projection, Source
from everruns_pipelines.reporting.keys import declared_hashes, differs, hash_of, seed, sliced_facts
from everruns_pipelines.reporting.query import (
    EVERYTHING,
    columns_of,
    expected_rows,
    rows_of,
    selected_rows,
)
from everruns_pipelines.reporting.slices import (
    CHOSEN,
    choose_sessions,
    chosen_slices,
    create_temporary,
    slice_sessions,
)

_OF_ORG = sql.SQL(
    "JOIN organizations AS scope ON scope.org_id = {org_id} AND scope.org_id = %(org_id)s"
)
_SETTINGS: tuple[LiteralString, ...] = (
    # Whole tables are read: worth their workers, whatever the estimates say.
    "SET LOCAL parallel_tuple_cost = 0",
    "SET LOCAL min_parallel_table_scan_size = '1MB'",
    # Tables are read from end to end, which the kernel foresees. Handing every block over from
    # PostgreSQL's own reading processes costs more than it gains.
    "SET LOCAL effective_io_concurrency = 0",
    # Every worker would read all of one side.
    "SET LOCAL enable_mergejoin = off",
    # Documents hardly ever repeat.
    "SET LOCAL enable_memoize = off",
)

# The default assumes a spinning disk, and scans instead of looking up.
_LOOKS_UP: LiteralString = "SET LOCAL random_page_cost = 1.1"


def find_missing(
    connection: Connection,
    sources: Collection[Source],
    org_id: int | None,
    *,
    keep_digests: bool = True,
) -> None:
    """Fill pg_temp.missing (source_type, reason, org_id, source_id, at), each source once.

    It lasts until the end of the transaction, and so do the settings that the planner needs.

    Args:
        org_id: one organization; None for all of them.
        keep_digests: keep what was read of sessions and their events for the next time.
    """
    scope = EVERYTHING if org_id is None else _OF_ORG
    parameters: dict[str, Any] = {"org_id": org_id, "seed": seed()}
    for setting in _SETTINGS:
        connection.execute(setting)
    if org_id is not None:
        connection.execute(_LOOKS_UP)

    parts = [(fact, part) for fact in FACTS for part in fact.projections if part.source in sources]
    sliced = [(fact, part) for fact, part in parts if fact in sliced_facts()]
    found: list[sql.Composable] = [sql.SQL(_NOTHING)]
    found += _in_whole([part for part in parts if part not in sliced], scope)
    if sliced:
        slice_sessions(connection, scope, parameters, keep=keep_digests)
        found += _in_slices(connection, sliced, scope, parameters)
    # In the order of the outbox's index, in which they will be looked up.
    everything = sql.SQL("{} ORDER BY org_id, source_type, source_id").format(
        sql.SQL(" UNION ").join(found)
    )
    create_temporary(connection, "missing", everything, parameters)


def _in_whole(
    parts: Collection[tuple[Fact, Projection]], selection: sql.SQL
) -> Iterable[sql.Composed]:
    """Queries that compare all rows that must be there with all that are."""
    yield from (_lacking(fact, part, selection) for fact, part in parts)
    yield from (_superseded(fact, part, selection) for fact, part in parts if part.supersedes)


def _lacking(fact: Fact, projection: Projection, selection: sql.SQL) -> sql.Composed:
    """Sources of expected rows that are not stored, or stored with other values."""
    same = [sql.SQL("fact.org_id = expected.org_id AND fact.source_key = expected.source_key")]
    same += [
        sql.SQL("fact.{0} IS NOT DISTINCT FROM expected.{0}").format(sql.Identifier(column))
        for column in projection.tracks
    ]
    return sql.SQL(_LACKING).format(
        type=sql.Literal(projection.source.type),
        reason=sql.Literal(projection.source.reason),
        expected=expected_rows(fact, projection, selection),
        fact=sql.Identifier(fact.table),
        same=sql.SQL(" AND ").join(same),
    )


def _superseded(fact: Fact, projection: Projection, selection: sql.SQL) -> sql.Composed:
    """Sources with a fact that their projection no longer makes."""
    return sql.SQL(
        "SELECT {type}, {reason}, source.org_id, source.source_id::text, source.at"
        " FROM (SELECT org_id, id AS source_id, {time} AS at FROM ({sources}) AS source) AS source"
        " JOIN {fact} AS fact ON {superseded}"
        " WHERE NOT EXISTS ("
        "SELECT FROM ({expected}) AS expected"
        " WHERE expected.org_id = fact.org_id AND expected.source_key = fact.source_key)"
    ).format(
        type=sql.Literal(projection.source.type),
        reason=sql.Literal(projection.source.reason),
        time=sql.Identifier(projection.source.time),
        sources=selected_rows(projection.source, projection.event_types, selection),
        fact=sql.Identifier(fact.table),
        superseded=sql.SQL(projection.supersedes or "true"),
        expected=expected_rows(fact, projection, selection),
    )


def _in_slices(
    connection: Connection,
    parts: Collection[tuple[Fact, Projection]],
    scope: sql.SQL,
    parameters: dict[str, Any],
) -> list[sql.Composable]:
    """Queries for the sources that lack a fact, or have one too many, in the slices."""
    slices = choose_sessions(connection, differs(sliced_facts()), parameters)
    if slices is None:
        return list(_in_whole(parts, scope))
    if slices == 0:
        return []
    connection.execute(_LOOKS_UP)
    if any(part.source is EVENT for _, part in parts):
        create_temporary(connection, "explanations", _explanations(), parameters)
    found = list[sql.Composable]()
    for number, (facts, query) in enumerate(_steps(parts)):
        if choose_sessions(connection, differs(facts), parameters):
            table = f"found_{number}"
            create_temporary(connection, table, query, parameters)
            connection.execute(_settle(table, facts))
            found.append(sql.SQL(_OF_FOUND).format(sql.Identifier(table)))
    superseding = [(fact, part) for fact, part in parts if part.supersedes]
    if superseding and choose_sessions(
        connection, differs(fact for fact, _ in superseding), parameters
    ):
        found += [_superseded(fact, part, CHOSEN) for fact, part in superseding]
    return found


def _explanations() -> sql.Composed:
    """Events whose key of a fact is what their session differs by in it.

    They are likely to be what is missing; it is still to be looked up.
    """
    return sql.SQL(_EXPLANATIONS).format(
        columns=columns_of(EVENT),
        events=rows_of(EVENT),
        slices=chosen_slices(),
        explains=sql.SQL(" OR ").join(
            sql.SQL("{0} <> 0 AND {0} = {1}").format(sql.Identifier("slice", fact.table), key)
            for fact, key in declared_hashes("{only}").items()
        ),
    )


def _steps(
    parts: Collection[tuple[Fact, Projection]],
) -> Iterable[tuple[Collection[Fact], sql.Composed]]:
    """Queries for sources that lack some fact, and the hashes of the keys, the cheapest first.

    Where a fact's difference is the xor of what was found, it is settled, and not looked at again.
    """
    of_events = [part for part in parts if part[1].source is EVENT]
    of_sessions = [part for part in parts if part[1].source is SESSION]
    declared = list(declared_hashes("{only}"))
    if of_events:
        yield declared, _looked_up_events(_OF_EXPLANATIONS)
        # Few events say themselves which keys they make.
        yield from (([fact], _looked_up(fact, part)) for fact, part in of_events if not part.key)
        yield declared, _looked_up_events(_OF_THE_REST)
    yield from (([fact], _looked_up(fact, part)) for fact, part in of_sessions)


def _looked_up_events(events: LiteralString) -> sql.Composed:
    """Events of which a declared key is not stored."""
    lacking = declared_hashes(_IS_LACKING)
    return sql.SQL(_LOOKED_UP_EVENTS).format(
        type=sql.Literal(EVENT.type),
        reason=sql.Literal(EVENT.reason),
        lacking=sql.SQL(", ").join(
            sql.SQL("CASE WHEN {0} <> 0 THEN {1} ELSE 0 END AS {2}").format(
                sql.Identifier("slice", fact.table), keys, sql.Identifier(fact.table)
            )
            for fact, keys in lacking.items()
        ),
        events=sql.SQL(events).format(events=rows_of(EVENT)),
        slices=chosen_slices(),
        is_lacking=differs(lacking),
    )


def _looked_up(fact: Fact, projection: Projection) -> sql.Composed:
    """Sources of expected rows that are not stored."""
    return sql.SQL(_LOOKED_UP).format(
        type=sql.Literal(projection.source.type),
        reason=sql.Literal(projection.source.reason),
        hash=hash_of(fact, "org_id", sql.SQL("source_key")),
        expected=expected_rows(fact, projection, CHOSEN),
        fact=sql.Identifier(fact.table),
    )


def _settle(found: str, facts: Collection[Fact]) -> sql.Composed:
    """Take what was found out of the differences."""
    names = [sql.Identifier(fact.table) for fact in facts]
    return sql.SQL(_SETTLE).format(
        found=sql.Identifier(found),
        keys=sql.SQL(", ").join(sql.SQL("bit_xor({0}) AS {0}").format(name) for name in names),
        remaining=sql.SQL(", ").join(
            sql.SQL("{0} = slice.{0} # found.{0}").format(name) for name in names
        ),
    )


_NOTHING = """
SELECT NULL::text AS source_type, NULL::text AS reason, NULL::bigint AS org_id,
    NULL::text AS source_id, NULL::timestamptz AS at
WHERE false
"""

_LACKING = """
SELECT {type}, {reason}, org_id, split_part(source_key, ':', 2), created_at
FROM ({expected}) AS expected
WHERE NOT EXISTS (SELECT FROM {fact} AS fact WHERE {same})
"""

_EXPLANATIONS = """
SELECT {columns}
FROM sessions AS session
{slices}
JOIN {events} AS source ON source.session_id = session.id
WHERE session.id = ANY (%(sessions)s::uuid[]) AND ({explains})
"""

_OF_EXPLANATIONS: LiteralString = """
pg_temp.explanations AS source
JOIN sessions AS session ON session.id = source.session_id
"""

_OF_THE_REST: LiteralString = """
sessions AS session
JOIN {events} AS source
    ON source.session_id = session.id AND session.id = ANY (%(sessions)s::uuid[])
"""

# OFFSET: key by key. How many there are cannot be told beforehand, and a plan for too many reads
# all of the fact.
_LOOKED_UP = """
SELECT
    {type} AS source_type,
    {reason} AS reason,
    org_id,
    split_part(source_key, ':', 2) AS source_id,
    created_at AS at,
    session_id,
    {hash} AS {fact}
FROM ({expected}) AS expected
LEFT JOIN LATERAL (
    SELECT true AS is_there FROM {fact} AS fact
    WHERE fact.org_id = expected.org_id AND fact.source_key = expected.source_key
    OFFSET 0
) AS stored ON true
WHERE is_there IS NULL
"""

_LOOKED_UP_EVENTS = """
SELECT *
FROM (
    SELECT
        {type} AS source_type,
        {reason} AS reason,
        session.org_id,
        source.id::text AS source_id,
        ts AS at,
        source.session_id,
        {lacking}
    FROM {events}
    {slices}
    OFFSET 0
) AS looked_up
WHERE {is_lacking}
"""

_IS_LACKING = """
{only} AND NOT EXISTS (
    SELECT FROM {fact} AS fact
    WHERE fact.org_id = session.org_id AND fact.source_key = {key}
    OFFSET 0
)
"""

_OF_FOUND = "SELECT source_type, reason, org_id, source_id, at FROM pg_temp.{}"

_SETTLE = """
WITH found AS (SELECT session_id, {keys} FROM pg_temp.{found} GROUP BY session_id)
UPDATE pg_temp.slices AS slice SET {remaining}
FROM found
WHERE found.session_id = slice.session_id
"""
