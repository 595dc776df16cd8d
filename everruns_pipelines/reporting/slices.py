"""Which sessions have other facts of their events than they must have, and by which keys.

Sessions are compared fact by fact: the xor of the hashes of all keys that a session must have and
of all that it has is 0 if, and but for a chance of 2^-64 only if, they are the same.

Which keys a session and its events make is read once and kept as a digest. A digest says what it
was made of, by the ids of the events, which never change, and by what of the session matters; it
counts for exactly that.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from psycopg import errors, sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import EVENT, SESSION, Fact
from everruns_pipelines.reporting.erasure import forget_sessions
from everruns_pipelines.reporting.keys import (
    declared_hashes,
    differs,
    each_fact,
    hash_of,
    parts_of,
    seed_of,
    sliced_facts,
)
from everruns_pipelines.reporting.query import EVERYTHING, expected_rows, selected_rows

# Held by whoever keeps digests. Nobody waits for it: what is not kept is read again.
_DIGESTS_LOCK = 0x6576_7270_6469_6773
# Where more sessions differ, or are to be read, everything is.
_MOST_SESSIONS = 20_000

# A selection: the sessions that `choose_sessions` chose. A join without columns, so that the
# condition can stand where joins do.
CHOSEN = sql.SQL("JOIN (SELECT) AS chosen ON {session_id} = ANY (%(sessions)s::uuid[])")
THEIR_SESSION = sql.SQL("JOIN sessions AS session ON session.id = source.session_id")
_EVENT_ID = sql.SQL("uuid_hash_extended(source.id, %(seed)s)")


def create_temporary(
    connection: Connection, table: str, query: sql.Composable, parameters: dict[str, Any]
) -> None:
    """Keep the rows of a query until the end of the transaction."""
    name = sql.Identifier(table)
    connection.execute(sql.SQL("DROP TABLE IF EXISTS pg_temp.{}").format(name))
    connection.execute(
        sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS {}").format(name, query), parameters
    )


def slice_sessions(
    connection: Connection, scope: sql.SQL, parameters: dict[str, Any], *, keep_digests: bool
) -> None:
    """Fill pg_temp.slices (session_id, digest_holds, and a column named like each fact).

    The column of a fact is the xor of the hashes of the keys of it by which the session differs: 0
    where it does not. Sessions that differ in no fact may be there too.

    Args:
        scope: a selection: all, or one organization.
        keep_digests: keep what is read of sessions and their events for the next time.
    """
    query = sql.SQL(_SLICES).format(
        differences=each_fact(
            "stored.{fact} # CASE WHEN digest.inputs = stored.inputs THEN keys[{position}] ELSE 0"
            " END AS {fact}"
        ),
        keys=each_fact("coalesce(bit_xor({fact}), 0) AS {fact}"),
        facts=each_fact("{fact}"),
        parts=_union_all(_slice_parts(scope)),
        scope=scope.format(org_id=sql.SQL("session.org_id")),
        differs=differs(sliced_facts()),
    )
    create_temporary(connection, "slices", query, parameters)
    unread = choose_sessions(connection, sql.SQL("NOT digest_holds"), parameters)
    if unread != 0:
        read = sql.SQL(_READ).format(
            keys=each_fact("coalesce(bit_xor({fact}), 0) AS {fact}"),
            parts=_union_all(_read_parts(scope if unread is None else CHOSEN)),
            facts=each_fact("{fact}"),
        )
        create_temporary(connection, "read", read, parameters)
        connection.execute(
            sql.SQL(_TAKE_IN).format(each_fact("{fact} = slice.{fact} # read.{fact}"))
        )
    if keep_digests:
        try:
            with connection.transaction():
                _keep_digests(connection, scope, parameters, are_read=unread != 0)
        except (errors.SerializationFailure, errors.UniqueViolation):
            # Somebody else has kept or forgotten some since our snapshot: what is not kept is read
            # again.
            pass


def choose_sessions(
    connection: Connection, condition: sql.Composable, parameters: dict[str, Any]
) -> int | None:
    """Make the slices of the condition those of `CHOSEN` and `chosen_slices`.

    As parameters, since a query that reads a temporary table has no parallel workers.

    Returns:
        How many there are. None: too many, and none is chosen.
    """
    row = connection.execute(
        sql.SQL(
            "SELECT count(*), array_agg(session_id)::text, {differences}"
            " FROM (SELECT * FROM pg_temp.slices WHERE {condition} LIMIT {most} + 1) AS slice"
        ).format(
            differences=each_fact("array_agg({fact})::text"),
            condition=condition,
            most=sql.Literal(_MOST_SESSIONS),
        )
    ).fetchone()
    assert row is not None
    if row[0] > _MOST_SESSIONS:
        return None
    names = ("sessions", *(fact.table for fact in sliced_facts()))
    parameters.update((name, value or "{}") for name, value in zip(names, row[1:], strict=True))
    return row[0]


def chosen_slices() -> sql.Composed:
    """Joins to `session` how it differs, as `slice`: only sessions that are chosen."""
    return sql.SQL(
        "JOIN unnest(%(sessions)s::uuid[], {differences}) AS slice (id, {facts})"
        " ON slice.id = session.id"
    ).format(differences=each_fact("{parameter}::bigint[]"), facts=each_fact("{fact}"))


def _slice_parts(scope: sql.SQL) -> Iterable[sql.Composable]:
    """Per session: what its keys are made of, and the keys of its facts."""
    for table in EVENT.tables:
        yield sql.SQL(
            "SELECT session_id, bit_xor({id}), {no_keys} FROM {events} AS source {scope} GROUP BY 1"
        ).format(
            id=_EVENT_ID,
            no_keys=_key_columns({}),
            events=sql.Identifier(table),
            scope=_of_org(scope),
        )
    for inputs in _inputs_of_sessions(scope):
        yield sql.SQL("SELECT session_id, hash, {no_keys} FROM ({inputs}) AS session").format(
            no_keys=_key_columns({}), inputs=inputs
        )
    for fact in sliced_facts():
        keys = sql.SQL("bit_xor({})").format(hash_of(fact, "source.org_id", sql.SQL("source_key")))
        yield sql.SQL(
            "SELECT session_id, NULL, {keys} FROM {fact} AS source {scope} GROUP BY 1"
        ).format(
            keys=_key_columns({fact: keys}),
            fact=sql.Identifier(fact.table),
            scope=scope.format(org_id=sql.SQL("source.org_id")),
        )


def _read_parts(selection: sql.SQL) -> Iterable[sql.Composable]:
    """Per session: what keys are made of, and these keys."""
    declared = {
        fact: sql.SQL("bit_xor({})").format(hashes)
        for fact, hashes in declared_hashes("{only}").items()
    }
    for table in EVENT.tables:
        yield sql.SQL(
            "SELECT session_id, bit_xor({id}), {keys}"
            " FROM {events} AS source {session} {selection} GROUP BY 1"
        ).format(
            id=_EVENT_ID,
            keys=_key_columns(declared),
            events=sql.Identifier(table),
            session=THEIR_SESSION,
            selection=selection.format(
                org_id=sql.SQL("session.org_id"), session_id=sql.SQL("source.session_id")
            ),
        )
    for inputs in _inputs_of_sessions(selection):
        yield sql.SQL("SELECT session_id, hash, {no_keys} FROM ({inputs}) AS session").format(
            no_keys=_key_columns({}), inputs=inputs
        )
    for fact, part in (*parts_of(EVENT), *parts_of(SESSION)):
        if not part.key:
            keys = sql.SQL("bit_xor({})").format(hash_of(fact, "org_id", sql.SQL("source_key")))
            yield sql.SQL(
                "SELECT session_id, NULL, {keys} FROM ({expected}) AS expected GROUP BY 1"
            ).format(keys=_key_columns({fact: keys}), expected=expected_rows(fact, part, selection))


def _inputs_of_sessions(selection: sql.SQL) -> Iterable[sql.Composed]:
    """Queries for (session_id, hash), one for each projection that reads sessions."""
    for fact, part in parts_of(SESSION):
        yield sql.SQL(
            "WITH selected AS NOT MATERIALIZED ({selected})"
            " SELECT session_id, hash_record_extended(inputs, {seed}) AS hash"
            " FROM ({inputs}) AS session"
        ).format(
            selected=selected_rows(SESSION, (), selection),
            seed=seed_of(fact, "org_id"),
            inputs=sql.SQL(part.inputs),
        )


def _of_org(scope: sql.SQL) -> sql.Composed:
    """The scope, for a table that knows its organization only by its session."""
    session = sql.SQL("") if scope is EVERYTHING else THEIR_SESSION
    return sql.SQL("{} {}").format(session, scope.format(org_id=sql.SQL("session.org_id")))


def _key_columns(values: Mapping[Fact, sql.Composable]) -> sql.Composed:
    """The columns of all facts, for a part that has keys of these."""
    return sql.SQL(", ").join(values.get(fact, sql.SQL("NULL::bigint")) for fact in sliced_facts())


def _keep_digests(
    connection: Connection, scope: sql.SQL, parameters: dict[str, Any], *, are_read: bool
) -> None:
    locked = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_DIGESTS_LOCK]).fetchone()
    if locked != (True,):
        return
    if are_read:
        connection.execute(_FORGET_DIGESTS)
        connection.execute(sql.SQL(_KEEP_DIGESTS).format(each_fact("read.{fact}")), parameters)
    if scope is EVERYTHING:
        forget_sessions(connection)


def _union_all(queries: Iterable[sql.Composable]) -> sql.Composed:
    return sql.SQL(" UNION ALL ").join(queries)


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
DELETE FROM everruns_pipelines.key_digests
WHERE session_id IN (SELECT session_id FROM pg_temp.slices WHERE NOT digest_holds)
"""

_KEEP_DIGESTS = """
INSERT INTO everruns_pipelines.key_digests (session_id, seed, inputs, keys)
SELECT session_id, %(seed)s, read.inputs, ARRAY[{}]
FROM pg_temp.read
JOIN pg_temp.slices USING (session_id)
WHERE NOT digest_holds
"""
