"""Digests: what is kept of sessions and of the archive, so that the next look need not read it.

`everruns_pipelines.key_digests` has a row per session: what its keys were made of, and their xor.
`everruns_pipelines.archive_digest` has one row, the xor of the ids of all archived events that the
rows of sessions were made of: by an index of the archive it is known whether these are all.
"""

from dataclasses import dataclass
from typing import Any

from psycopg import errors, sql

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import EVENT
from everruns_pipelines.reporting.erasure import forget_sessions
from everruns_pipelines.reporting.keys import EVENT_ID, each_fact

# Held by whoever keeps digests. Nobody waits for it: what is not kept is read again.
_LOCK = 0x6576_7270_6469_6773


@dataclass(frozen=True)
class Archive:
    """All archived events, each as the xor of the hashes of their ids.

    Args:
        ids: those that there are.
        known: those that digests of sessions were made of; None if that is not known.
    """

    ids: int
    known: int | None


def look_at_archive(connection: Connection, parameters: dict[str, Any]) -> Archive:
    """Which events are archived: an index tells."""
    query = sql.SQL(_ARCHIVE).format(id=EVENT_ID, archive=sql.Identifier(str(EVENT.archive)))
    [row] = connection.execute(query, parameters).fetchall()
    return Archive(*row)


def read_of_archive(connection: Connection) -> int:
    """By which archived events pg_temp.read differs from the digests, as the xor of their ids."""
    [(change,)] = connection.execute(_READ_OF_ARCHIVE).fetchall()
    return change


def keep_digests(
    connection: Connection,
    parameters: dict[str, Any],
    *,
    are_read: bool,
    archive: Archive | None,
) -> None:
    """Keep what was read of sessions and their events for the next time.

    Args:
        are_read: there is something in pg_temp.read.
        archive: if all sessions were looked at: the archived events that they and their digests
            are made of now.
    """
    try:
        with connection.transaction():
            locked = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_LOCK]).fetchone()
            if locked != (True,):
                return
            if are_read:
                change = read_of_archive(connection)
                connection.execute(_FORGET)
                connection.execute(sql.SQL(_KEEP).format(each_fact("read.{fact}")), parameters)
                connection.execute(_KEEP_CHANGE, parameters | {"change": change})
            if archive is not None:
                if archive.ids != archive.known:
                    connection.execute("DELETE FROM everruns_pipelines.archive_digest")
                    connection.execute(_KEEP_ARCHIVE, parameters | {"ids": archive.ids})
                forget_sessions(connection)
    except (errors.SerializationFailure, errors.UniqueViolation):
        # Somebody else has kept or forgotten some since our snapshot: what is not kept is read
        # again.
        pass


_ARCHIVE = """
SELECT
    coalesce(bit_xor({id}), 0),
    (SELECT ids FROM everruns_pipelines.archive_digest WHERE seed = %(seed)s)
FROM {archive} AS source
"""

_READ_OF_ARCHIVE = """
SELECT coalesce(bit_xor(read.archived # slice.archived), 0)
FROM pg_temp.read
JOIN pg_temp.slices AS slice USING (session_id)
WHERE NOT digest_holds
"""

_FORGET = """
DELETE FROM everruns_pipelines.key_digests
WHERE session_id IN (SELECT session_id FROM pg_temp.slices WHERE NOT digest_holds)
"""

_KEEP = """
INSERT INTO everruns_pipelines.key_digests (session_id, seed, inputs, archived, keys)
SELECT session_id, %(seed)s, read.inputs, read.archived, ARRAY[{}]
FROM pg_temp.read
JOIN pg_temp.slices USING (session_id)
WHERE NOT digest_holds
"""

_KEEP_CHANGE = """
UPDATE everruns_pipelines.archive_digest SET ids = ids # %(change)s
WHERE seed = %(seed)s AND %(change)s <> 0
"""

_KEEP_ARCHIVE = """
INSERT INTO everruns_pipelines.archive_digest (seed, ids) VALUES (%(seed)s, %(ids)s)
"""
