"""Which sessions have other facts of their events than they must have, and by which keys.

Sessions are compared fact by fact: the xor of the hashes of all keys that a session must have and
of all that it has is 0 if, and but for a chance of 2^-64 only if, they are the same.

Which keys a session and its events make is read once and kept as a digest. A digest says what it
was made of, by the ids of the events, which never change, and by what of the session matters; it
counts for exactly that.

Archived events are not read again: the archive only grows, and digests say which ones there were.
Whether that is still so is known by the ids of the whole archive, which an index holds: what is new
in it must be just what was read of sessions that have changed. If it is not, all of it is read.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import EVENT, SESSION, Fact
from everruns_pipelines.reporting.digests import keep_digests, look_at_archive, read_of_archive
from everruns_pipelines.reporting.keys import (
    EVENT_ID,
    declared_hashes,
    differs,
    each_fact,
    hash_of,
    parts_of,
    seed_of,
    sliced_facts,
)
from everruns_pipelines.reporting.query import EVERYTHING, expected_rows, selected_rows

# Where more sessions differ, or are to be read, everything is.
_MOST_SESSIONS = 20_000

# A selection: the sessions that `choose_sessions` chose. A join without columns, so that the
# condition can stand where joins do.
CHOSEN = sql.SQL("JOIN (SELECT) AS chosen ON {session_id} = ANY (%(sessions)s::uuid[])")
THEIR_SESSION = sql.SQL("JOIN sessions AS session ON session.id = source.session_id")


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
    connection: Connection, scope: sql.SQL, parameters: dict[str, Any], *, keep: bool
) -> None:
    """Fill pg_temp.slices (session_id, digest_holds, archived, and a column named like each fact).

    The column of a fact is the xor of the hashes of the keys of it by which the session differs: 0
    where it does not. Sessions that differ in no fact may be there too.

    Args:
        scope: a selection: all, or one organization.
        keep: keep digests of what is read of sessions and their events for the next time.
    """
    archive = look_at_archive(connection, parameters) if scope is EVERYTHING else None
    if archive is None or archive.known is None:
        are_read = _compare(connection, scope, parameters, read_archive=True)
    else:
        are_read = _compare(connection, scope, parameters, read_archive=False)
        change = read_of_archive(connection) if are_read else 0
        if archive.known ^ change != archive.ids:
            are_read = _compare(connection, scope, parameters, read_archive=True)
    if keep:
        keep_digests(connection, parameters, are_read=are_read, archive=archive)


def _compare(
    connection: Connection, scope: sql.SQL, parameters: dict[str, Any], *, read_archive: bool
) -> bool:
    """Fill pg_temp.slices; and pg_temp.read with what is read of sessions, if any are.

    Args:
        read_archive: else digests are believed which events of their sessions are archived.

    Returns:
        Whether any are read.
    """
    query = sql.SQL(_SLICES).format(
        differences=each_fact(
            "stored.{fact} # CASE WHEN digest_holds THEN keys[{position}] ELSE 0 END AS {fact}"
        ),
        keys=each_fact("coalesce(bit_xor({fact}), 0) AS {fact}"),
        facts=each_fact("{fact}"),
        parts=_union_all(_slice_parts(scope, read_archive=read_archive)),
        archived=sql.SQL("stored.archived" if read_archive else "digest.archived"),
        scope=scope.format(org_id=sql.SQL("session.org_id")),
        differs=differs(sliced_facts()),
    )
    create_temporary(connection, "slices", query, parameters)
    unread = choose_sessions(connection, sql.SQL("NOT digest_holds"), parameters)
    if unread == 0:
        return False
    read = sql.SQL(_READ).format(
        keys=each_fact("coalesce(bit_xor({fact}), 0) AS {fact}"),
        parts=_union_all(_read_parts(scope if unread is None else CHOSEN)),
        facts=each_fact("{fact}"),
    )
    create_temporary(connection, "read", read, parameters)
    connection.execute(sql.SQL(_TAKE_IN).format(each_fact("{fact} = slice.{fact} # read.{fact}")))
    return True


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


def _slice_parts(scope: sql.SQL, *, read_archive: bool) -> Iterable[sql.Composable]:
    """Per session: what its keys are made of, and the keys of its facts."""
    for table in EVENT.tables if read_archive else (EVENT.table,):
        yield sql.SQL(
            "SELECT session_id, {ids}, {no_keys} FROM {events} AS source {scope} GROUP BY 1"
        ).format(
            ids=_ids(table),
            no_keys=_key_columns({}),
            events=sql.Identifier(table),
            scope=_of_org(scope),
        )
    for inputs in _inputs_of_sessions(scope):
        yield sql.SQL("SELECT session_id, hash, 0, {no_keys} FROM ({inputs}) AS session").format(
            no_keys=_key_columns({}), inputs=inputs
        )
    for fact in sliced_facts():
        keys = sql.SQL("bit_xor({})").format(hash_of(fact, "source.org_id", sql.SQL("source_key")))
        yield sql.SQL(
            "SELECT session_id, 0, 0, {keys} FROM {fact} AS source {scope} GROUP BY 1"
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
            "SELECT session_id, {ids}, {keys}"
            " FROM {events} AS source {session} {selection} GROUP BY 1"
        ).format(
            ids=_ids(table),
            keys=_key_columns(declared),
            events=sql.Identifier(table),
            session=THEIR_SESSION,
            selection=selection.format(
                org_id=sql.SQL("session.org_id"), session_id=sql.SQL("source.session_id")
            ),
        )
    for inputs in _inputs_of_sessions(selection):
        yield sql.SQL("SELECT session_id, hash, 0, {no_keys} FROM ({inputs}) AS session").format(
            no_keys=_key_columns({}), inputs=inputs
        )
    for fact, part in (*parts_of(EVENT), *parts_of(SESSION)):
        if not part.key:
            keys = sql.SQL("bit_xor({})").format(hash_of(fact, "org_id", sql.SQL("source_key")))
            yield sql.SQL(
                "SELECT session_id, 0, 0, {keys} FROM ({expected}) AS expected GROUP BY 1"
            ).format(keys=_key_columns({fact: keys}), expected=expected_rows(fact, part, selection))


def _ids(table: str) -> sql.Composed:
    """The ids of events, as `inputs` and as `archived`."""
    ids = sql.SQL("bit_xor({})").format(EVENT_ID)
    return sql.SQL("0, {}" if table == EVENT.archive else "{}, 0").format(ids)


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


def _union_all(queries: Iterable[sql.Composable]) -> sql.Composed:
    return sql.SQL(" UNION ALL ").join(queries)


# Whichever session is gone, nothing of it can be missing. A digest is compared and taken in by one
# statement: somebody else may replace it at any time.
_SLICES = """
SELECT session_id, digest_holds, archived, {facts}
FROM (
    SELECT stored.session_id, digest_holds, coalesce(digest.archived, 0) AS archived, {differences}
    FROM (
        SELECT session_id, bit_xor(inputs) AS inputs, bit_xor(archived) AS archived, {keys}
        FROM ({parts}) AS parts (session_id, inputs, archived, {facts})
        GROUP BY session_id
    ) AS stored
    LEFT JOIN everruns_pipelines.key_digests AS digest
        ON digest.session_id = stored.session_id AND digest.seed = %(seed)s
    CROSS JOIN LATERAL (
        SELECT (digest.inputs, digest.archived) IS NOT DISTINCT FROM (stored.inputs, {archived})
            AS digest_holds
    ) AS compared
) AS slice
JOIN sessions AS session ON session.id = session_id {scope}
WHERE NOT digest_holds OR {differs}
"""

_READ = """
SELECT session_id, bit_xor(inputs) AS inputs, bit_xor(archived) AS archived, {keys}
FROM ({parts}) AS parts (session_id, inputs, archived, {facts})
GROUP BY session_id
"""

_TAKE_IN = """
UPDATE pg_temp.slices AS slice
SET {}
FROM pg_temp.read
WHERE read.session_id = slice.session_id AND NOT digest_holds
"""
