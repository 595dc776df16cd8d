"""Finds every source that lacks a fact, has a stale one, or one too many. See docs/backfill.md.

Facts of events are by far the most, so they are first compared session by session, fact by fact:
the xor of the hashes of all keys that a session must have and of all that it has is 0 if, and but
for a chance of 2^-64 only if, they are the same. Only where it is not are keys looked up.

Which keys a session and its events make is read once and kept as a digest. A digest says what it
was made of, by the ids of the events, which never change, and by what of the session matters; it
counts for exactly that.
"""

from collections.abc import Collection, Iterable, Mapping
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
    # Every worker would read all of one side.
    "SET LOCAL enable_mergejoin = off",
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

    It lasts until the end of the transaction, and so do the settings that the planner needs.

    Args:
        org_id: one organization; None for all of them.
        keep_digests: keep what was read of sessions and their events for the next time.
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
    # In the order of the outbox's index, in which they will be looked up.
    everything = sql.SQL("{} ORDER BY org_id, source_type, source_id").format(
        sql.SQL(" UNION ").join(found)
    )
    _create(connection, "missing", everything, parameters)


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
    versions = "".join(f"{FACTS.index(fact)} {fact.version}" for fact in _sliced_facts())
    return int(sha256(versions.encode()).hexdigest()[:15], 16)


def _slice(
    connection: Connection, scope: sql.SQL, parameters: dict[str, Any], *, keep_digests: bool
) -> None:
    """Fill pg_temp.slices (session_id, digest_holds, and each fact): sessions, and how they differ.

    The value of a fact is the xor of the hashes of the keys of it by which the session differs.
    """
    parameters["oldest"] = _oldest_event(connection)
    query = sql.SQL(_SLICES).format(
        differences=_each_fact(
            "stored.{fact} # CASE WHEN digest.inputs = stored.inputs THEN keys[{position}] ELSE 0"
            " END AS {fact}"
        ),
        keys=_each_fact("coalesce(bit_xor({fact}), 0) AS {fact}"),
        facts=_each_fact("{fact}"),
        parts=_union_all(_slice_parts(scope, is_archived=parameters["oldest"] is not None)),
        scope=scope.format(org_id=sql.SQL("session.org_id")),
        differs=_differs(_sliced_facts()),
    )
    _create(connection, "slices", query, parameters)
    unread = _choose_sessions(connection, sql.SQL("NOT digest_holds"), parameters)
    if unread:
        read = sql.SQL(_READ).format(
            keys=_each_fact("coalesce(bit_xor({fact}), 0) AS {fact}"),
            parts=_union_all(_read_parts(scope if unread > _MOST_SESSIONS else _OF_SESSIONS)),
            facts=_each_fact("{fact}"),
        )
        _create(connection, "read", read, parameters)
        connection.execute(
            sql.SQL(_TAKE_IN).format(_each_fact("{fact} = slice.{fact} # read.{fact}"))
        )
        if keep_digests:
            _keep_digests(connection, parameters)


def _oldest_event(connection: Connection) -> str | None:
    """When the oldest event that projects was written, if others have been archived."""
    event_types = dict.fromkeys(kind for _, part in _parts_of(EVENT) for kind in part.event_types)
    row = connection.execute(
        sql.SQL(
            "SELECT min(created_at)::text FROM events"
            " WHERE event_type IN ({}) AND EXISTS (SELECT FROM archived_events)"
        ).format(sql.SQL(", ").join(map(sql.Literal, event_types)))
    ).fetchone()
    assert row is not None
    return row[0]


def _choose_sessions(
    connection: Connection, condition: sql.Composable, parameters: dict[str, Any]
) -> int:
    """Make slices the sessions of `_OF_SESSIONS`, unless they are too many; how many there are.

    As parameters, since a query that reads a temporary table has no parallel workers.
    """
    row = connection.execute(
        sql.SQL(
            "SELECT count(*), array_agg(session_id)::text, {differences}"
            " FROM (SELECT * FROM pg_temp.slices WHERE {condition} LIMIT {most} + 1) AS slice"
        ).format(
            differences=_each_fact("array_agg({fact})::text"),
            condition=condition,
            most=sql.Literal(_MOST_SESSIONS),
        )
    ).fetchone()
    assert row is not None
    names = ("sessions", *(fact.table for fact in _sliced_facts()))
    parameters.update((name, value or "{}") for name, value in zip(names, row[1:], strict=True))
    return row[0]


def _differs(facts: Iterable[Fact]) -> sql.Composed:
    """Which slices differ in any of the facts."""
    return sql.SQL(" OR ").join(sql.SQL("{} <> 0").format(sql.Identifier(f.table)) for f in facts)


def _each_fact(text: LiteralString) -> sql.Composed:
    """The text once for each fact that is sliced: its column, parameter, or place in a digest."""
    return sql.SQL(", ").join(
        sql.SQL(text).format(
            fact=sql.Identifier(fact.table),
            parameter=sql.Placeholder(fact.table),
            position=sql.Literal(position),
        )
        for position, fact in enumerate(_sliced_facts(), start=1)
    )


def _keys_of(values: Mapping[Fact, sql.Composable]) -> sql.Composed:
    """The columns of a part that knows the keys of these facts."""
    return sql.SQL(", ").join(values.get(fact, sql.SQL("NULL::bigint")) for fact in _sliced_facts())


def _slice_parts(scope: sql.SQL, *, is_archived: bool) -> Iterable[sql.Composable]:
    """Per session: what its keys are made of, and the keys of its facts.

    Facts older than every event are left out: those of archived events. A cutoff that leaves out
    others makes sessions differ, which costs look-ups, but hides nothing.
    """
    yield sql.SQL(
        "SELECT session_id, bit_xor({id}), {no_keys} FROM events AS source {scope} GROUP BY 1"
    ).format(id=_EVENT_ID, no_keys=_keys_of({}), scope=_by_session(scope))
    for inputs in _inputs_of_sessions(scope):
        yield sql.SQL("SELECT session_id, hash, {no_keys} FROM ({inputs}) AS session").format(
            no_keys=_keys_of({}), inputs=inputs
        )
    for fact in _sliced_facts():
        keys = sql.SQL("bit_xor({})").format(_hash(fact, "source.org_id", sql.SQL("source_key")))
        yield sql.SQL(
            "SELECT session_id, NULL, {keys} FROM {fact} AS source {scope} {since} GROUP BY 1"
        ).format(
            keys=_keys_of({fact: keys}),
            fact=sql.Identifier(fact.table),
            scope=scope.format(org_id=sql.SQL("source.org_id")),
            since=sql.SQL(_SINCE_OLDEST if is_archived else "").format(
                session=sql.Literal(f"{SESSION.type}:")
            ),
        )


def _read_parts(selection: sql.SQL) -> Iterable[sql.Composable]:
    """Per session: what keys are made of, and these keys."""
    declared = {
        fact: sql.SQL("bit_xor({})").format(keys) for fact, keys in _declared_keys("{only}").items()
    }
    yield sql.SQL(
        "SELECT session_id, bit_xor({id}), {keys}"
        " FROM events AS source {session} {selection} GROUP BY 1"
    ).format(
        id=_EVENT_ID,
        keys=_keys_of(declared),
        session=_THEIR_SESSION,
        selection=selection.format(
            org_id=sql.SQL("session.org_id"), session_id=sql.SQL("source.session_id")
        ),
    )
    for inputs in _inputs_of_sessions(selection):
        yield sql.SQL("SELECT session_id, hash, {no_keys} FROM ({inputs}) AS session").format(
            no_keys=_keys_of({}), inputs=inputs
        )
    for fact, part in (*_parts_of(EVENT), *_parts_of(SESSION)):
        if not part.key:
            keys = sql.SQL("bit_xor({})").format(_hash(fact, "org_id", sql.SQL("source_key")))
            yield sql.SQL(
                "SELECT session_id, NULL, {keys} FROM ({expected}) AS expected GROUP BY 1"
            ).format(keys=_keys_of({fact: keys}), expected=_expected(fact, part, selection))


def _inputs_of_sessions(selection: sql.SQL) -> Iterable[sql.Composed]:
    """Queries for (session_id, hash), one for each projection that reads sessions."""
    for fact, part in _parts_of(SESSION):
        yield sql.SQL(
            "WITH selected AS NOT MATERIALIZED ({selected})"
            " SELECT session_id, hash_record_extended(inputs, {seed}) AS hash"
            " FROM ({inputs}) AS session"
        ).format(
            selected=selected_rows(SESSION, (), selection),
            seed=_seed_of(fact, "org_id"),
            inputs=sql.SQL(part.inputs),
        )


def _keep_digests(connection: Connection, parameters: dict[str, Any]) -> None:
    locked = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_DIGESTS_LOCK]).fetchone()
    if locked == (True,):
        connection.execute(_FORGET_DIGESTS)
        connection.execute(sql.SQL(_KEEP_DIGESTS).format(_each_fact("read.{fact}")), parameters)


def _parts_of(source: Source) -> Iterable[tuple[Fact, Projection]]:
    return (
        (fact, part)
        for fact in _sliced_facts()
        for part in fact.projections
        if part.source is source
    )


def _declared_keys(condition: LiteralString) -> dict[Fact, sql.Composed]:
    """The xor of the hashes of a fact's declared keys, over `source`, where `condition` is met."""
    hashes: dict[Fact, dict[str, list[sql.Composed]]] = {}
    for fact, part in _parts_of(EVENT):
        if part.key:
            key = sql.SQL(part.key)
            hash_of_key = sql.SQL("CASE WHEN {} THEN {} ELSE 0 END").format(
                sql.SQL(condition).format(
                    only=sql.SQL(part.only), fact=sql.Identifier(fact.table), key=key
                ),
                _hash(fact, "session.org_id", key),
            )
            for event_type in part.event_types:
                hashes.setdefault(fact, {}).setdefault(event_type, []).append(hash_of_key)
    return {
        fact: sql.SQL("CASE event_type {} ELSE 0 END").format(
            sql.SQL(" ").join(
                sql.SQL("WHEN {} THEN {}").format(sql.Literal(kind), sql.SQL(" # ").join(of_type))
                for kind, of_type in by_type.items()
            )
        )
        for fact, by_type in hashes.items()
    }


def _hash(fact: Fact, org_id: LiteralString, key: sql.Composable) -> sql.Composed:
    return sql.SQL("hashtextextended({}, {})").format(key, _seed_of(fact, org_id))


def _seed_of(fact: Fact, org_id: LiteralString) -> sql.Composed:
    """What is of another fact or another organization has other hashes."""
    return sql.SQL("%(seed)s # {} # {}").format(
        sql.Literal(FACTS.index(fact) << 32), sql.SQL(org_id)
    )


def _by_session(selection: sql.SQL) -> sql.Composed:
    """A selection of rows that have no organization of their own; joins no more than it needs."""
    return sql.SQL("{} {}").format(
        _THEIR_SESSION if selection is _OF_ORG else sql.SQL(""),
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
    slices = _choose_sessions(connection, _differs(_sliced_facts()), parameters)
    if slices > _MOST_SESSIONS:
        return [
            *(_lacking(fact, part, scope) for fact, part in parts),
            *(_superseded(fact, part, scope) for fact, part in parts if part.supersedes),
        ]
    # The default assumes a spinning disk, and scans instead of looking up.
    connection.execute("SET LOCAL random_page_cost = 1.1")
    if slices and any(part.source is EVENT for _, part in parts):
        _create(connection, "explanations", _explanations(), parameters)
    found = list[sql.Composable]()
    for number, (facts, query) in enumerate(_steps(parts)):
        if _choose_sessions(connection, _differs(facts), parameters):
            table = f"found_{number}"
            _create(connection, table, query, parameters)
            connection.execute(_settle(table, facts))
            found.append(sql.SQL(_OF_FOUND).format(sql.Identifier(table)))
    superseding = [(fact, part) for fact, part in parts if part.supersedes]
    if superseding and _choose_sessions(
        connection, _differs(fact for fact, _ in superseding), parameters
    ):
        found += [_superseded(fact, part, _OF_SESSIONS) for fact, part in superseding]
    return found


def _explanations() -> sql.Composed:
    """Events whose key of a fact is what their session differs by in it.

    They are likely to be what is missing; it is still to be looked up.
    """
    return sql.SQL(_EXPLANATIONS).format(
        slices=_their_slices(),
        explains=sql.SQL(" OR ").join(
            sql.SQL("{0} <> 0 AND {0} = {1}").format(sql.Identifier("slice", fact.table), key)
            for fact, key in _declared_keys("{only}").items()
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
    declared = list(_declared_keys("{only}"))
    if of_events:
        yield declared, _looked_up_events(_OF_EXPLANATIONS)
        # Few events say themselves which keys they make.
        yield from (([fact], _looked_up(fact, part)) for fact, part in of_events if not part.key)
        yield declared, _looked_up_events(_OF_THE_REST)
    yield from (([fact], _looked_up(fact, part)) for fact, part in of_sessions)


def _looked_up_events(events: LiteralString) -> sql.Composed:
    """Events of which a declared key is not stored."""
    lacking = _declared_keys(_IS_LACKING)
    return sql.SQL(_LOOKED_UP_EVENTS).format(
        type=sql.Literal(EVENT.type),
        reason=sql.Literal(EVENT.reason),
        lacking=sql.SQL(", ").join(
            sql.SQL("CASE WHEN {0} <> 0 THEN {1} ELSE 0 END AS {2}").format(
                sql.Identifier("slice", fact.table), keys, sql.Identifier(fact.table)
            )
            for fact, keys in lacking.items()
        ),
        events=sql.SQL(events),
        slices=_their_slices(),
        is_lacking=_differs(lacking),
    )


def _looked_up(fact: Fact, projection: Projection) -> sql.Composed:
    """Sources of expected rows that are not stored."""
    return sql.SQL(_LOOKED_UP).format(
        type=sql.Literal(projection.source.type),
        reason=sql.Literal(projection.source.reason),
        hash=_hash(fact, "org_id", sql.SQL("source_key")),
        expected=_expected(fact, projection, _OF_SESSIONS),
        fact=sql.Identifier(fact.table),
    )


def _settle(found: str, facts: Collection[Fact]) -> sql.Composed:
    """Take what was found out of the differences."""
    names = [sql.Identifier(fact.table) for fact in facts]
    return sql.SQL(_SETTLE).format(
        found=sql.Identifier(found),
        keys=sql.SQL(", ").join(sql.SQL("bit_xor({0}) AS {0}").format(name) for name in names),
        settled=sql.SQL(", ").join(
            sql.SQL("{0} = slice.{0} # found.{0}").format(name) for name in names
        ),
    )


def _their_slices() -> sql.Composed:
    return sql.SQL(
        "JOIN unnest(%(sessions)s::uuid[], {differences}) AS slice (id, {facts})"
        " ON slice.id = session.id"
    ).format(differences=_each_fact("{parameter}::bigint[]"), facts=_each_fact("{fact}"))


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


_EVENT_ID = sql.SQL("uuid_hash_extended(source.id, %(seed)s)")
_THEIR_SESSION = sql.SQL("JOIN sessions AS session ON session.id = source.session_id")

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

# Whichever session is gone, nothing of it can be missing. A digest is compared and taken in by one
# statement: somebody else may replace it at any time.
_SLICES = """
SELECT session_id, digest_holds, {facts}
FROM (
    SELECT
        stored.session_id,
        digest.inputs IS NOT DISTINCT FROM stored.inputs AS digest_holds,
        {differences}
    FROM (
        SELECT session_id, coalesce(bit_xor(inputs), 0) AS inputs, {keys}
        FROM ({parts}) AS parts (session_id, inputs, {facts})
        GROUP BY session_id
    ) AS stored
    LEFT JOIN everruns_pipelines.key_digests AS digest
        ON digest.session_id = stored.session_id AND digest.seed = %(seed)s
) AS slice
JOIN sessions AS session ON session.id = session_id {scope}
WHERE NOT digest_holds OR {differs}
"""

_SINCE_OLDEST = """
WHERE source.created_at >= %(oldest)s::timestamptz OR starts_with(source_key, {session})
"""

_READ = """
SELECT session_id, bit_xor(inputs) AS inputs, {keys}
FROM ({parts}) AS parts (session_id, inputs, {facts})
GROUP BY session_id
"""

_TAKE_IN = """
UPDATE pg_temp.slices AS slice
SET {}
FROM pg_temp.read
WHERE read.session_id = slice.session_id AND NOT digest_holds
"""

_FORGET_DIGESTS = """
DELETE FROM everruns_pipelines.key_digests AS digest
WHERE session_id IN (SELECT session_id FROM pg_temp.slices WHERE NOT digest_holds)
    OR NOT EXISTS (SELECT FROM sessions WHERE sessions.id = digest.session_id)
"""

_KEEP_DIGESTS = """
INSERT INTO everruns_pipelines.key_digests (session_id, seed, inputs, keys)
SELECT session_id, %(seed)s, read.inputs, ARRAY[{}]
FROM pg_temp.read
JOIN pg_temp.slices USING (session_id)
WHERE NOT digest_holds
"""

_EXPLANATIONS = """
SELECT source.*
FROM sessions AS session
{slices}
JOIN events AS source ON source.session_id = session.id
WHERE session.id = ANY (%(sessions)s::uuid[]) AND ({explains})
"""

_OF_EXPLANATIONS: LiteralString = """
pg_temp.explanations AS source
JOIN sessions AS session ON session.id = source.session_id
"""

_OF_THE_REST: LiteralString = """
sessions AS session
JOIN events AS source
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
UPDATE pg_temp.slices AS slice SET {settled}
FROM found
WHERE found.session_id = slice.session_id
"""
