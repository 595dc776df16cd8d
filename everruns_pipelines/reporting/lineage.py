"""Which of the platform's tables and columns a fact is made of, as follows from the catalog."""

import re

from everruns_pipelines.reporting.catalog import EVENT, SESSION, Column, Fact, Projection
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS

# Every fact takes its organization and the dimensions that its projection leaves out from these.
_OF_DIMENSIONS = {"session": "sessions", "agent": "agents", "harness": "harnesses"}
_RELATION = re.compile(r"\b(?:FROM|JOIN)\s+(\w+)")


def tables_of(fact: Fact) -> list[str]:
    """The platform's tables whose rows its rows are made of, archives included."""
    made_of: set[str] = set(_OF_DIMENSIONS.values())
    for projection in fact.projections:
        made_of.update(projection.source.tables, _named_in(projection))
    return [table for table in SOURCE_COLUMNS if table in made_of]


def columns_of(fact: Fact) -> dict[str, list[tuple[str, str]]]:
    """By column of the fact, the columns (table, column) that it is made of.

    What only the SELECT of a projection says is left out: nothing here reads SQL.
    """
    made_of = {
        column.name: [
            of
            for projection in fact.projections
            for table in projection.source.tables
            for of in _made_of(column, projection, table)
        ]
        for column in fact.columns
    }
    return {name: list(dict.fromkeys(columns)) for name, columns in made_of.items() if columns}


def _made_of(column: Column, projection: Projection, table: str) -> list[tuple[str, str]]:
    """What a column is made of in rows that come from this table."""
    source = projection.source
    of_every_fact = {
        "org_id": ("sessions" if source.org_from_session else table, "org_id"),
        "source_key": (table, "id"),
        "session_id": (table, "id" if source is SESSION else "session_id"),
        "created_at": (table, source.time),
        "time_bucket_day": (table, source.time),
    }
    if column.name in of_every_fact:
        return [of_every_fact[column.name]]
    if column.dimension is None or column.name in projection.provides:
        return []
    relation, _, name = column.dimension.partition(".")
    return [(_OF_DIMENSIONS[relation], name)]


def _named_in(projection: Projection) -> set[str]:
    named = set(_RELATION.findall(projection.sql))
    return named.union(EVENT.tables) if "all_events" in named else named
