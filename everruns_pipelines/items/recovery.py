"""Fetches offloaded envelopes that may be fetched, and judges them like any other."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha1

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.envelope import Found, read_envelope
from everruns_pipelines.items.judging import judge_values, stage_values
from everruns_pipelines.items.objects import OBJECTS_AT_ONCE, ObjectStore

_SQL = read_statements("everruns_pipelines.items", "recovery.sql")


def recover(connection: Connection, session: str | None, store: ObjectStore | None) -> int:
    """How many envelopes were fetched; of the others, why not stands in their candidates.

    Args:
        session: as for `judge`.
    """
    if store is None:
        connection.execute(_SQL["tell_there_is_no_store"])
        return 0
    with connection.transaction():
        stage_values(connection, _fetched(connection, store))
    connection.execute(_SQL["make_room"])
    judge_values(connection, session)
    row = connection.execute(
        "SELECT count(*) FROM staged_values WHERE value IS NOT NULL"
    ).fetchone()
    return 0 if row is None else row[0]


def _fetched(connection: Connection, store: ObjectStore) -> Iterator[tuple[int, bool, Found]]:
    with connection.cursor("offloaded") as cursor:
        cursor.execute(_SQL["offloaded"])
        while rows := cursor.fetchmany(OBJECTS_AT_ONCE):
            objections = [
                "the span names no uri" if uri is None else store.objection(uri, others)
                for _, _, _, uri, _, others in rows
            ]
            uris = [
                row[3] for row, objection in zip(rows, objections, strict=True) if not objection
            ]
            answers = iter(store.fetch(uris))
            for (span, position, key, uri, size, _), objection in zip(
                rows, objections, strict=True
            ):
                answer = objection or next(answers)
                yield span, True, _as_found(Found(position, key, uri=uri, size=size), answer)


def _as_found(named: Found, answer: bytes | str) -> Found:
    """What an answer of the store is for the envelope that a span names."""
    if isinstance(answer, bytes) and not _is_the_one(named, answer):
        answer = "the object is not the one that was offloaded: its hash or its size differs"
    if isinstance(answer, str):
        return replace(named, reason="offloaded", detail=answer)
    return read_envelope(named.position, named.key_hint, answer)


def _is_the_one(named: Found, body: bytes) -> bool:
    """Whether it is the body that the SDK named by its hash, and of its size."""
    name = sha1(body, usedforsecurity=False).hexdigest()[:16]
    is_named = named.uri is not None and named.uri.rsplit("/", 1)[-1] == name
    return is_named and named.size == len(body)
