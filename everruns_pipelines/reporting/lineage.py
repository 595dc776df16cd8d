"""Which of the platform's tables a fact is made of: as follows from the catalog and its SELECTs."""

import re

from everruns_pipelines.reporting.catalog import EVENT, Fact, Projection
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS

# Every fact takes its organization and the dimensions that its projection leaves out from these.
_OF_DIMENSIONS = ("sessions", "agents", "harnesses")
_RELATION = re.compile(r"\b(?:FROM|JOIN)\s+(\w+)")


def tables_of(fact: Fact) -> list[str]:
    """The platform's tables whose rows its rows are made of, archives included."""
    made_of: set[str] = set(_OF_DIMENSIONS)
    for projection in fact.projections:
        made_of.update(projection.source.tables, _named_in(projection))
    return [table for table in SOURCE_COLUMNS if table in made_of]


def _named_in(projection: Projection) -> set[str]:
    named = set(_RELATION.findall(projection.sql))
    return named.union(EVENT.tables) if "all_events" in named else named
