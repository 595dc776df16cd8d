"""Finds every source that lacks a fact, has a stale one, or one too many. See docs/backfill.md.

Facts of events are by far the most, so they are first compared session by session: the xor of the
hashes of all keys that a session must have and of all that it has is 0 if, and but for a chance of
2^-64 only if, they are the same. Only of sessions that differ are keys looked up.

Which keys the events of a session make is read once and kept as a digest, for events never change.
A digest says which events it is of, and counts for exactly these.
"""

from collections.abc import Collection, Iterable
from functools import cache
from hashlib import sha256
from typing import Any, LiteralString

from psycopg import sql

from everruns_pipelines.postgres import Connection
from everruns_pipelines.reporting.catalog import EVENT, FACTS, SESSION, Fact, Projection, Source
from everruns_pipelines.reporting.query import EVERYTHING, projected_rows, selected_rows

# Held by whoever keeps digests. Nobody waits for it: what is not kept is read again.
_DIGESTS_LOCK = 0x6576_7270_6469_6773
# Where more sessions differ, or are to be read, everything is.
_MOST_SESSIONS = 20_000

_OF_ORG = sql.SQL(
    "JOIN organizations AS scope ON scope.org_id = {org_id} AND scope.org_id = %(org_id)s"
)
_OF_SESSIONS = sql.SQL("JOIN (SELECT) AS slices ON {session_id} = ANY (%(sessions)s::uuid[])")
_SETTINGS: tuple[LiteralString, ...] = (
    # Whole tables are read: worth their workers, whatever the estimates say.
    "SET LOCAL parallel_tuple_cost = 0",
    "SET LOCAL min_parallel_table_scan_size = '1MB'",
    # Tables are read from end to end, which the kernel foresees. Handing every block over from
    # PostgreSQL's own reading processes costs more than it gains.
    "SET LOCAL effective_io_concurrency = 0",
    # Documents hardly ever repeat.
    "SET LOCAL enable_memoize = off",
)


def find_missing(
    connection: Connection,
    sources: Collection[Source],
    org_id: int | None,
    *,
    keep_digests: bool = True,
) -> None:
    """Fill pg_temp.missing (source_type, reason, org_id, source_id, at), each source once.

    Lasts until the end of the transaction.

    Args:
        org_id: one organization; None for all of them.
        keep_digests: keep what was read of events for the next time.
    """
    scope = EVERYTHING if org_id is None else _OF_ORG
    parameters: dict[str, Any] = {"org_id": org_id, "seed": _seed()}
    for setting in _SETTINGS:
        connection.execute(setting)

    parts = [(fact, part) for fact in FACTS for part in fact.projections if part.source in sources]
    sliced = [(fact, part) for fact, part in parts if fact in _sliced_facts()]
    found: list[sql.Composable] = [sql.SQL(_NOTHING)]
    found += [_lacking(fact, part, scope) for fact, part in parts if fact not in _sliced_facts()]
    if sliced:
        _slice(connection, scope, parameters, keep_digests=keep_digests)
        found += _in_slices(connection, sliced, scope, parameters)
    _create(connection, "missing", sql.SQL(" UNION ").join(found), parameters)
    connection.execute("ANALYZE pg_temp.missing")


def _create(
    connection: Connection, table: str, query: sql.Composable, parameters: dict[str, Any]
) -> None:
    """Keep the rows of a query until the end of the transaction."""
    name = sql.Identifier(table)
    connection.execute(sql.SQL("DROP TABLE IF EXISTS pg_temp.{}").format(name))
    connection.execute(
        sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS {}").format(name, query), parameters
    )


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
        expected=_expected(fact, projection, selection),
        fact=sql.Identifier(fact.table),
        same=sql.SQL(" AND ").join(same),
    )


def _expected(fact: Fact, projection: Projection, selection: sql.SQL) -> sql.Composed:
    return sql.SQL("SELECT * FROM ({}) AS projected WHERE rejected IS NULL").format(
        projected_rows(fact, projection, selection)
    )


# Which sessions differ, and by what.


@cache
def _sliced_facts() -> tuple[Fact, ...]:
    """Facts that have rows of events, and none that could lack a session."""
    return tuple(
        fact
        for fact in FACTS
        if EVENT in fact.sources and {EVENT, SESSION}.issuperset(fact.sources)
    )


@cache
def _seed() -> int:
    """The seed of all hashes: another one as soon as projections may make other keys."""
    versions = "".join(fact.version for fact in _sliced_facts())
    return int(sha256(versions.encode()).hexdigest()[:15], 16)


def _slice(
    connection: Connection, scope: sql.SQL, parameters: dict[str, Any], *, keep_digests: bool
) -> None:
    """Fill pg_temp.slices (session_id, org_id, is_read, difference): the sessions that differ.

    `difference` is the xor of the hashes of the keys by which they do. It is unknown, and NULL,
    where facts of the session stand under another organization.
    """
    query = sql.SQL(_SLICES).format(
        parts=_union_all(_slice_parts(scope)), scope=scope.format(org_id=sql.SQL("session.org_id"))
    )
    _create(connection, "slices", query, parameters)
    unread = _choose_sessions(connection, "NOT is_read", parameters)
    if unread:
        read = _union_all(_read_parts(scope if unread > _MOST_SESSIONS else _OF_SESSIONS))
        _create(connection, "read", sql.SQL(_READ).format(parts=read), parameters)
        connection.execute(_TAKE_IN)
        if keep_digests:
            _keep_digests(connection, parameters)
    connection.execute("DELETE FROM pg_temp.slices WHERE difference = 0")


def _choose_sessions(
    connection: Connection, condition: LiteralString, parameters: dict[str, Any]
) -> int:
    """Make slices the sessions of `_OF_SESSIONS`, unless they are too many; how many there are.

    As parameters, since a query that reads a temporary table has no parallel workers.
    """
    row = connection.execute(
        sql.SQL(
            "SELECT count(*), array_agg(session_id) FILTER (WHERE number <= {most})::text,"
            " array_agg(difference) FILTER (WHERE number <= {most})::text FROM ("
            "SELECT *, row_number() OVER () AS number FROM pg_temp.slices WHERE {condition}"
            ") AS slice"
        ).format(most=sql.Literal(_MOST_SESSIONS), condition=sql.SQL(condition))
    ).fetchone()
    assert row is not None
    parameters["sessions"], parameters["differences"] = (value or "{}" for value in row[1:])
    return row[0]


def _slice_parts(scope: sql.SQL) -> Iterable[sql.Composable]:
    """Per session: its organization, which events it has, what its digest says, and other keys."""
    yield sql.SQL(
        "SELECT session_id, NULL::bigint, NULL::bigint, bit_xor({id}), NULL::bigint, NULL::bigint"
        " FROM {events} GROUP BY 1"
    ).format(id=sql.SQL(_EVENT_ID), events=_events(scope))
    yield sql.SQL(
        "SELECT session_id, NULL, NULL, events, keys, NULL"
        " FROM everruns_pipelines.event_digests AS source {scope} WHERE seed = %(seed)s"
    ).format(scope=_by_session(scope))
    yield sql.SQL(
        "SELECT id, source.org_id, source.org_id, NULL, NULL, NULL FROM sessions AS source {}"
    ).format(scope.format(org_id=sql.SQL("source.org_id")))
    for fact in _sliced_facts():
        yield sql.SQL(
            "SELECT session_id, min(source.org_id), max(source.org_id), NULL, NULL, bit_xor({hash})"
            " FROM {fact} AS source {scope} GROUP BY 1"
        ).format(
            hash=_hash(fact, sql.SQL("source_key")),
            fact=sql.Identifier(fact.table),
            scope=scope.format(org_id=sql.SQL("source.org_id")),
        )
    for fact, part in _parts_of(SESSION):
        yield sql.SQL(
            "SELECT session_id, NULL, NULL, NULL, NULL, bit_xor({hash})"
            " FROM ({expected}) AS expected GROUP BY 1"
        ).format(hash=_hash(fact, sql.SQL("source_key")), expected=_expected(fact, part, scope))


def _read_parts(selection: sql.SQL) -> Iterable[sql.Composable]:
    """Per session: which events it has, and the keys that they make."""
    yield sql.SQL(
        "SELECT session_id, bit_xor({id}), bit_xor(CASE event_type {keys} END)"
        " FROM {events} GROUP BY 1"
    ).format(
        id=sql.SQL(_EVENT_ID),
        keys=sql.SQL(" ").join(
            sql.SQL("WHEN {} THEN {}").format(sql.Literal(kind), sql.SQL(" # ").join(hashes))
            for kind, hashes in _hashes_of_events().items()
        ),
        events=_events(selection),
    )
    for fact, part in _parts_of(EVENT):
        if not part.key:
            yield sql.SQL(
                "SELECT session_id, NULL, bit_xor({hash}) FROM ({expected}) AS expected GROUP BY 1"
            ).format(
                hash=_hash(fact, sql.SQL("source_key")), expected=_expected(fact, part, selection)
            )


def _keep_digests(connection: Connection, parameters: dict[str, Any]) -> None:
    locked = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_DIGESTS_LOCK]).fetchone()
    if locked == (True,):
        connection.execute(_FORGET_DIGESTS)
        connection.execute(_KEEP_DIGESTS, parameters)


def _parts_of(source: Source) -> Iterable[tuple[Fact, Projection]]:
    return (
        (fact, part)
        for fact in _sliced_facts()
        for part in fact.projections
        if part.source is source
    )


def _hashes_of_events() -> dict[str, list[sql.Composed]]:
    """By event type the hashes of declared keys, over `source`: 0 where the event makes none."""
    hashes: dict[str, list[sql.Composed]] = {}
    for fact, part in _parts_of(EVENT):
        if part.key:
            for event_type in part.event_types:
                hashes.setdefault(event_type, []).append(
                    sql.SQL("CASE WHEN {} THEN {} ELSE 0 END").format(
                        sql.SQL(part.only), _hash(fact, sql.SQL(part.key))
                    )
                )
    return hashes


def _hash(fact: Fact, key: sql.Composable) -> sql.Composed:
    """Keys of different facts are different."""
    return sql.SQL("hashtextextended({}, %(seed)s + {})").format(
        key, sql.Literal(FACTS.index(fact))
    )


def _events(selection: sql.SQL) -> sql.Composed:
    """The projected events of a selection, as `source`, without what they say."""
    event_types = dict.fromkeys(kind for _, part in _parts_of(EVENT) for kind in part.event_types)
    return sql.SQL("events AS source {} WHERE event_type IN ({})").format(
        _by_session(selection), sql.SQL(", ").join(map(sql.Literal, event_types))
    )


def _by_session(selection: sql.SQL) -> sql.Composed:
    """A selection of rows that have no organization of their own; joins no more than it needs."""
    session = "JOIN sessions AS session ON session.id = source.session_id"
    return sql.SQL("{} {}").format(
        sql.SQL(session if selection is _OF_ORG else ""),
        selection.format(org_id=sql.SQL("session.org_id"), session_id=sql.SQL("source.session_id")),
    )


# What is missing in the sessions that differ.


def _in_slices(
    connection: Connection,
    parts: Collection[tuple[Fact, Projection]],
    scope: sql.SQL,
    parameters: dict[str, Any],
) -> list[sql.Composable]:
    """Queries for the sources that lack a fact, or have one too many, in the slices."""
    slices = _choose_sessions(connection, "true", parameters)
    if slices > _MOST_SESSIONS:
        return [
            *(_lacking(fact, part, scope) for fact, part in parts),
            *(_superseded(fact, part, scope) for fact, part in parts if part.supersedes),
        ]
    # The default assumes a spinning disk, and scans instead of looking up.
    connection.execute("SET LOCAL random_page_cost = 1.1")
    found = list[sql.Composable]()
    for number, query in enumerate(_explained(parts)):
        if slices:
            table = f"explained_{number}"
            _create(connection, table, query, parameters)
            found.append(sql.SQL(_OF_EXPLAINED).format(sql.Identifier(table)))
            connection.execute(sql.SQL(_FORGET_EXPLAINED).format(sql.Identifier(table)))
            slices = _choose_sessions(connection, "true", parameters)
    if slices:
        found += _looked_up(parts)
        found += [_superseded(fact, part, _OF_SESSIONS) for fact, part in parts if part.supersedes]
    return found


def _explained(parts: Collection[tuple[Fact, Projection]]) -> Iterable[sql.Composable]:
    """Queries for sources by whose expected keys, or one of them, their session differs.

    Where a single fact is missing its source is found so, and no key has to be looked up.
    """
    if any(part.key for _, part in parts):
        yield sql.SQL(_EXPLAINED_EVENTS).format(
            type=sql.Literal(EVENT.type),
            reason=sql.Literal(EVENT.reason),
            hashes=sql.SQL(" ").join(
                sql.SQL("WHEN {} THEN difference IN ({}, {})").format(
                    sql.Literal(kind), sql.SQL(", ").join(hashes), sql.SQL(" # ").join(hashes)
                )
                for kind, hashes in _hashes_of_events().items()
            ),
        )
    for fact, part in parts:
        if not part.key:
            yield sql.SQL(_EXPLAINED).format(
                type=sql.Literal(part.source.type),
                reason=sql.Literal(part.source.reason),
                expected=_expected(fact, part, _OF_SESSIONS),
                hash=_hash(fact, sql.SQL("source_key")),
            )


def _looked_up(parts: Collection[tuple[Fact, Projection]]) -> Iterable[sql.Composable]:
    """Queries for sources of which a key is not stored."""
    declared: dict[str, list[sql.Composed]] = {}
    for fact, part in parts:
        if part.key:
            for event_type in part.event_types:
                declared.setdefault(event_type, []).append(
                    sql.SQL(_IS_LACKING).format(
                        only=sql.SQL(part.only),
                        fact=sql.Identifier(fact.table),
                        key=sql.SQL(part.key),
                    )
                )
        else:
            yield sql.SQL(_LOOKED_UP).format(
                type=sql.Literal(part.source.type),
                reason=sql.Literal(part.source.reason),
                expected=_expected(fact, part, _OF_SESSIONS),
                fact=sql.Identifier(fact.table),
            )
    if declared:
        yield sql.SQL(_LOOKED_UP_EVENTS).format(
            type=sql.Literal(EVENT.type),
            reason=sql.Literal(EVENT.reason),
            lacking=sql.SQL(" ").join(
                sql.SQL("WHEN {} THEN {}").format(sql.Literal(kind), sql.SQL(" OR ").join(lacking))
                for kind, lacking in declared.items()
            ),
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
        expected=_expected(fact, projection, selection),
    )


def _union_all(queries: Iterable[sql.Composable]) -> sql.Composed:
    return sql.SQL(" UNION ALL ").join(queries)


_EVENT_ID: LiteralString = "uuid_hash_extended(source.id, %(seed)s)"

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

# OFFSET: key by key. How many there are cannot be told beforehand, and a plan for too many reads
# all of the fact.
_LOOKED_UP = """
SELECT {type}, {reason}, org_id, split_part(source_key, ':', 2), created_at
FROM ({expected}) AS expected
LEFT JOIN LATERAL (
    SELECT true AS is_there FROM {fact} AS fact
    WHERE fact.org_id = expected.org_id AND fact.source_key = expected.source_key
    OFFSET 0
) AS stored ON true
WHERE is_there IS NULL
"""

_LOOKED_UP_EVENTS = """
SELECT {type}, {reason}, session.org_id, source.id::text, ts
FROM events AS source
JOIN sessions AS session ON session.id = source.session_id
WHERE session_id = ANY (%(sessions)s::uuid[]) AND CASE event_type {lacking} END
"""

_IS_LACKING = """
({only} AND NOT EXISTS (
    SELECT FROM {fact} AS fact
    WHERE fact.org_id = session.org_id AND fact.source_key = {key}
    OFFSET 0
))
"""

# Whichever session is gone, nothing of it can be missing.
_SLICES = """
SELECT
    session_id,
    session.org_id,
    events = 0 AS is_read,
    CASE WHEN first_org = last_org THEN keys # CASE WHEN events = 0 THEN digest ELSE 0 END END
        AS difference
FROM (
    SELECT
        session_id,
        min(first_org) AS first_org,
        max(last_org) AS last_org,
        coalesce(bit_xor(events), 0) AS events,
        coalesce(bit_xor(digest), 0) AS digest,
        coalesce(bit_xor(keys), 0) AS keys
    FROM ({parts}) AS parts (session_id, first_org, last_org, events, digest, keys)
    GROUP BY session_id
) AS slice
JOIN sessions AS session ON session.id = session_id
{scope}
WHERE events <> 0 OR keys <> digest OR first_org <> last_org
"""

_READ = """
SELECT session_id, bit_xor(events) AS events, coalesce(bit_xor(keys), 0) AS keys
FROM ({parts}) AS parts (session_id, events, keys)
GROUP BY session_id
"""

_TAKE_IN = """
UPDATE pg_temp.slices AS slice
SET difference = difference # keys
FROM pg_temp.read
WHERE read.session_id = slice.session_id AND NOT is_read
"""

_FORGET_DIGESTS = """
DELETE FROM everruns_pipelines.event_digests AS digest
WHERE session_id IN (SELECT session_id FROM pg_temp.slices WHERE NOT is_read)
    OR NOT EXISTS (SELECT FROM sessions WHERE sessions.id = digest.session_id)
"""

_KEEP_DIGESTS = """
INSERT INTO everruns_pipelines.event_digests (session_id, seed, events, keys)
SELECT session_id, %(seed)s, events, keys
FROM pg_temp.read
JOIN pg_temp.slices USING (session_id)
WHERE NOT is_read
"""

_EXPLAINED_EVENTS = """
SELECT
    {type} AS source_type,
    {reason} AS reason,
    session.org_id,
    source.id::text AS source_id,
    ts AS at,
    session_id
FROM events AS source
JOIN unnest(%(sessions)s::uuid[], %(differences)s::bigint[]) AS slice (id, difference)
    ON slice.id = source.session_id
JOIN sessions AS session ON session.id = source.session_id
WHERE CASE event_type {hashes} END
"""

_OF_EXPLAINED = "SELECT source_type, reason, org_id, source_id, at FROM pg_temp.{}"

_FORGET_EXPLAINED = (
    "DELETE FROM pg_temp.slices WHERE session_id IN (SELECT session_id FROM pg_temp.{})"
)

_EXPLAINED = """
SELECT
    {type} AS source_type,
    {reason} AS reason,
    org_id,
    split_part(source_key, ':', 2) AS source_id,
    created_at AS at,
    session_id
FROM ({expected}) AS expected
WHERE (session_id, {hash}) IN (
    SELECT id, difference
    FROM unnest(%(sessions)s::uuid[], %(differences)s::bigint[]) AS slice (id, difference)
)
"""
