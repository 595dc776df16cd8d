"""Hashes of the keys of facts, in SQL: by their xor, facts and sources are compared as sets.

A key has the same hash wherever it is made: of a fact's row, of an event, of a session.
"""

from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from typing import LiteralString

from psycopg import sql

from everruns_pipelines.reporting.catalog import EVENT, FACTS, SESSION, Fact, Projection, Source

# The hash of an event's id, over `source`.
EVENT_ID = sql.SQL("uuid_hash_extended(source.id, %(seed)s)")


@cache
def sliced_facts() -> tuple[Fact, ...]:
    """Facts that have rows of events, none that could lack a session, and none that go stale."""
    return tuple(
        fact
        for fact in FACTS
        if EVENT in fact.sources
        and {EVENT, SESSION}.issuperset(fact.sources)
        and not any(projection.tracks for projection in fact.projections)
    )


def parts_of(source: Source) -> Iterable[tuple[Fact, Projection]]:
    """The projections of these facts that read the source."""
    return (
        (fact, part)
        for fact in sliced_facts()
        for part in fact.projections
        if part.source is source
    )


@cache
def seed() -> int:
    """The parameter `seed` of all hashes: another one once projections may make other keys."""
    versions = "".join(f"{FACTS.index(fact)} {fact.version}" for fact in sliced_facts())
    return int(sha256(versions.encode()).hexdigest()[:15], 16)


def hash_of(fact: Fact, org_id: LiteralString, key: sql.Composable) -> sql.Composed:
    """The hash of a key of the fact, over a row that names its organization so."""
    return sql.SQL("hashtextextended({}, {})").format(key, seed_of(fact, org_id))


def seed_of(fact: Fact, org_id: LiteralString) -> sql.Composed:
    """What is of another fact or another organization has other hashes."""
    return sql.SQL("%(seed)s # {} # {}").format(
        sql.Literal(FACTS.index(fact) << 32), sql.SQL(org_id)
    )


def declared_hashes(condition: LiteralString) -> dict[Fact, sql.Composed]:
    """By fact the xor of the hashes of the keys that it declares, over `source` and `session`.

    Args:
        condition: which keys count. It may name {only}, {fact} and {key} of the projection.
    """
    hashes: dict[Fact, dict[str, list[sql.Composed]]] = {}
    for fact, part in parts_of(EVENT):
        if part.key:
            key = sql.SQL(part.key)
            hash_of_key = sql.SQL("CASE WHEN {} THEN {} ELSE 0 END").format(
                sql.SQL(condition).format(
                    only=sql.SQL(part.only), fact=sql.Identifier(fact.table), key=key
                ),
                hash_of(fact, "session.org_id", key),
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


def each_fact(text: LiteralString) -> sql.Composed:
    """The text once for each fact that is sliced: its column, parameter, or place in a digest."""
    return sql.SQL(", ").join(
        sql.SQL(text).format(
            fact=sql.Identifier(fact.table),
            parameter=sql.Placeholder(fact.table),
            position=sql.Literal(position),
        )
        for position, fact in enumerate(sliced_facts(), start=1)
    )


def differs(facts: Iterable[Fact]) -> sql.Composed:
    """A condition: the column of any of these facts is not 0."""
    return sql.SQL(" OR ").join(sql.SQL("{} <> 0").format(sql.Identifier(f.table)) for f in facts)
