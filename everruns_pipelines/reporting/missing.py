"""Finds every source that lacks a fact, has a stale one, or one too many. See docs/backfill.md.

Facts of events are by far the most, so they are first compared in slices, one for each session:
the xor of the hashes of all keys that the slice must have and of all that it has is 0 if, and but
for a chance of 2^-64 only if, they are the same. Key by key only the rest is compared.
"""

import secrets
from collections.abc import Collection, Iterable, Sequence
from typing import Any, LiteralString, cast

from psycopg import sql

from everruns_pipelines.postgres import Connection
from everruns_pipelines.reporting.catalog import (
    EVENT,
    FACTS,
    SESSION,
    Fact,
    Projection,
    Source,
)
from everruns_pipelines.reporting.query import EVERYTHING, projected_rows, selected_rows

_OF_ORG = sql.SQL(
    "JOIN organizations AS scope ON scope.org_id = {org_id} AND scope.org_id = %(org_id)s"
)
_SETTINGS: tuple[LiteralString, ...] = (
    # Whole tables are read: worth their workers, whatever the estimate of the groups says.
    "SET LOCAL parallel_tuple_cost = 0",
    # What differs is looked up by key. The default assumes a spinning disk, and scans instead.
    "SET LOCAL random_page_cost = 1.1",
    # Tables are read from end to end, which the kernel foresees. Handing every block over from
    # PostgreSQL's own reading processes costs more than it gains.
    "SET LOCAL effective_io_concurrency = 0",
    # Documents hardly ever repeat.
    "SET LOCAL enable_memoize = off",
)
_NOTHING = """
SELECT NULL::text AS source_type, NULL::text AS reason, NULL::bigint AS org_id,
    NULL::text AS source_id, NULL::timestamptz AS at
WHERE false
"""


def find_missing(connection: Connection, sources: Collection[Source], org_id: int | None) -> None:
    """Fill pg_temp.missing (source_type, reason, org_id, source_id, at), each source once.

    Lasts until the end of the transaction.

    Args:
        org_id: one organization; None for all of them.
    """
    scope = EVERYTHING if org_id is None else _OF_ORG
    parts = [(fact, part) for fact in FACTS for part in fact.projections if part.source in sources]
    sliced = [(fact, part) for fact, part in parts if _is_sliced(fact)]
    direct = [(fact, part) for fact, part in parts if not _is_sliced(fact)]
    # The hashes differ from call to call: no two sets of keys stay confused.
    parameters = {"org_id": org_id, "seed": secrets.randbits(63)}
    for table in ("slices", "suspects", "missing"):
        connection.execute(sql.SQL("DROP TABLE IF EXISTS pg_temp.{}").format(sql.Identifier(table)))
    for setting in _SETTINGS:
        connection.execute(setting)

    found = [sql.SQL(_NOTHING)]
    found += [_lacking(fact, part, projected_rows(fact, part, scope)) for fact, part in direct]
    facts = [fact for fact in FACTS if fact in {fact for fact, _ in sliced}]
    if facts and _create(connection, "slices", _differing_slices(facts, scope), parameters):
        suspects = [_suspects(fact, [part for of, part in sliced if of is fact]) for fact in facts]
        _create(connection, "suspects", _union_all(suspects), parameters)
        found += [_lacking(fact, part, _suspected(fact, part)) for fact, part in sliced]
        found += [_superseded(fact, part) for fact, part in sliced if part.supersedes]
    _create(connection, "missing", sql.SQL(" UNION ").join(found), parameters)


def _create(
    connection: Connection, table: str, query: sql.Composable, parameters: dict[str, Any]
) -> int:
    """Keep the rows of a query for the next one, which is planned for as many; how many."""
    name = sql.Identifier(table)
    rows = connection.execute(
        sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS {}").format(name, query), parameters
    ).rowcount
    connection.execute(sql.SQL("ANALYZE pg_temp.{}").format(name))
    return rows


def _lacking(fact: Fact, projection: Projection, expected: sql.Composable) -> sql.Composed:
    """Sources of expected rows that are not stored, or stored with other values."""
    same = [sql.SQL("fact.org_id = expected.org_id AND fact.source_key = expected.source_key")]
    same += [
        sql.SQL("fact.{0} IS NOT DISTINCT FROM expected.{0}").format(sql.Identifier(column))
        for column in projection.tracks
    ]
    return sql.SQL(
        "SELECT {type} AS source_type, {reason} AS reason, org_id,"
        " split_part(source_key, ':', 2) AS source_id, created_at AS at"
        " FROM ({expected}) AS expected"
        " WHERE rejected IS NULL AND NOT EXISTS (SELECT FROM {fact} AS fact WHERE {same})"
    ).format(
        type=sql.Literal(projection.source.type),
        reason=sql.Literal(projection.source.reason),
        expected=expected,
        fact=sql.Identifier(fact.table),
        same=sql.SQL(" AND ").join(same),
    )


# Slices.


def _is_sliced(fact: Fact) -> bool:
    """It has rows of events, and none that could lack a session."""
    sources = {projection.source for projection in fact.projections}
    return EVENT in sources and sources <= {EVENT, SESSION}


def _differing_slices(facts: Sequence[Fact], scope: sql.SQL) -> sql.Composed:
    """Of every fact the sessions whose keys differ, and by what: the xor of the keys' hashes.

    By what is unknown, and NULL, where facts of the session stand under another organization.
    """
    hashes = [_hashes_of_events(facts, scope)]
    for fact in facts:
        hashes.append(_hashes(facts, fact, _stored(fact, scope)))
        hashes += [
            _hashes(facts, fact, _expected(fact, projection, scope))
            for projection in fact.projections
            if not projection.key
        ]
    tables = [sql.Identifier(fact.table) for fact in facts]
    return sql.SQL(
        "SELECT org_id, session_id, fact, CASE WHEN is_of_one_org THEN difference END AS difference"
        " FROM ("
        "SELECT session.org_id, slice.*,"
        " (first_org, last_org) IS NOT DISTINCT FROM (session.org_id, session.org_id)"
        " OR first_org IS NULL AS is_of_one_org"
        " FROM ("
        "SELECT session_id, min(org_id) AS first_org, max(org_id) AS last_org, {differences}"
        " FROM ({hashes}) AS hashes (org_id, session_id, {columns})"
        " GROUP BY session_id"
        ") AS slice JOIN sessions AS session ON session.id = session_id"
        ") AS slice CROSS JOIN LATERAL (VALUES {rows}) AS of_fact (fact, difference)"
        " WHERE difference <> 0 OR NOT is_of_one_org"
    ).format(
        differences=sql.SQL(", ").join(
            sql.SQL("coalesce(bit_xor({0}), 0) AS {0}").format(table) for table in tables
        ),
        hashes=_union_all(hashes),
        columns=sql.SQL(", ").join(tables),
        rows=sql.SQL(", ").join(
            sql.SQL("({}, {})").format(sql.Literal(fact.table), sql.Identifier(fact.table))
            for fact in facts
        ),
    )


def _hashes_of_events(facts: Sequence[Fact], scope: sql.SQL) -> sql.Composed:
    """The hashes of all declared keys, in one pass over the events: a column for every fact.

    Their organization is their session's; joining a session to every event would cost a fifth of
    the pass, so it is joined to the slice instead.
    """
    declared = [[part for part in fact.projections if part.key] for fact in facts]
    session = "" if scope is EVERYTHING else "JOIN sessions AS session ON session.id = session_id"
    return sql.SQL(
        "SELECT NULL::bigint, session_id, {hashes} FROM events AS source {session} {scope}"
        " WHERE event_type IN ({event_types})"
    ).format(
        hashes=sql.SQL(", ").join(
            sql.SQL("CASE {} END").format(sql.SQL(" ").join(map(_hash_of_event, parts)))
            for parts in declared
        ),
        session=sql.SQL(session),
        scope=scope.format(org_id=sql.SQL("session.org_id")),
        event_types=_literals(
            dict.fromkeys(kind for parts in declared for part in parts for kind in part.event_types)
        ),
    )


def _hash_of_event(projection: Projection) -> sql.Composed:
    return sql.SQL("WHEN event_type IN ({types}) AND {only} THEN {hash}").format(
        types=_literals(projection.event_types),
        only=sql.SQL(projection.only),
        hash=_hash(sql.SQL(projection.key or "NULL")),
    )


def _hashes(facts: Sequence[Fact], fact: Fact, keys: sql.Composable) -> sql.Composed:
    """The hashes of the keys of one fact, in the columns of all."""
    return sql.SQL("SELECT org_id, session_id, {} FROM ({}) AS keys").format(
        sql.SQL(", ").join(
            _hash(sql.Identifier("source_key")) if other is fact else sql.SQL("NULL::bigint")
            for other in facts
        ),
        keys,
    )


def _hash(key: sql.Composable) -> sql.Composed:
    return sql.SQL("hashtextextended({}, %(seed)s)").format(key)


def _expected(fact: Fact, projection: Projection, scope: sql.SQL) -> sql.Composed:
    return sql.SQL(
        "SELECT org_id, session_id, source_key, created_at FROM ({}) AS projected"
        " WHERE rejected IS NULL"
    ).format(projected_rows(fact, projection, scope))


def _stored(fact: Fact, scope: sql.SQL) -> sql.Composed:
    return sql.SQL("SELECT fact.* FROM {} AS fact {}").format(
        sql.Identifier(fact.table), scope.format(org_id=sql.SQL("fact.org_id"))
    )


# What the slices that differ are made of.


def _suspects(fact: Fact, projections: Iterable[Projection]) -> sql.Composed:
    """The expected keys of slices that differ.

    Where the difference is the hash of an expected key, that key is the difference, and the others
    are not suspected. So they are wherever a single fact is missing.
    """
    return sql.SQL(
        "SELECT {name} AS fact, projection, org_id, source_key, created_at FROM ("
        "SELECT expected.*, {hash} IS NOT DISTINCT FROM difference AS is_difference,"
        " bool_or({hash} IS NOT DISTINCT FROM difference)"
        " OVER (PARTITION BY org_id, session_id) AS is_explained"
        " FROM ({expected}) AS expected"
        " JOIN pg_temp.slices AS slice USING (org_id, session_id)"
        " WHERE slice.fact = {name}"
        ") AS expected WHERE is_difference OR NOT is_explained"
    ).format(
        name=sql.Literal(fact.table),
        hash=_hash(sql.Identifier("source_key")),
        expected=_union_all(
            [
                sql.SQL("SELECT {} AS projection, expected.* FROM ({}) AS expected").format(
                    sql.Literal(projection.name),
                    _expected(fact, projection, _in_slices(fact, projection.source)),
                )
                for projection in projections
            ]
        ),
    )


def _suspected(fact: Fact, projection: Projection) -> sql.Composed:
    return sql.SQL(
        "SELECT *, NULL AS rejected FROM pg_temp.suspects WHERE fact = {} AND projection = {}"
    ).format(sql.Literal(fact.table), sql.Literal(projection.name))


def _superseded(fact: Fact, projection: Projection) -> sql.Composed:
    """Sources of slices that differ, with a fact that their projection no longer makes."""
    selection = _in_slices(fact, projection.source)
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
        expected=_expected(fact, projection, selection),
    )


def _in_slices(fact: Fact, source: Source) -> sql.SQL:
    session_id = "source.id" if source is SESSION else "source.session_id"
    return sql.SQL(
        "JOIN pg_temp.slices AS slice ON slice.org_id = {org_id}"
        f" AND slice.session_id = {session_id}"
        f" AND slice.fact = '{cast('LiteralString', fact.table)}'"
    )


def _literals(values: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Literal, values))


def _union_all(queries: Iterable[sql.Composable]) -> sql.Composed:
    return sql.SQL(" UNION ALL ").join(queries)
