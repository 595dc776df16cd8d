"""Tells what was found and is not stored, and what a rebuild did as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.batches import tally

_SQL = read_statements("everruns_pipelines.items", "accounting.sql")

_COUNTS = (
    "processed",
    "inserted",
    "refreshed",
    "unchanged",
    "rejected",
    "offloaded",
    "links_created",
    "links_unresolved",
)
_REST = ("spans", "spans_of_unknown_projects", "out_of_scope", "recovered")


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild did, or with `dry_run` would do. Counts of distinct items and links.

    `processed` = inserted + refreshed + unchanged. Beside it, disjoint: `rejected` envelopes and
    unreadable spans, `offloaded` envelopes that were not recovered.
    """

    processed: int
    inserted: int
    refreshed: int
    unchanged: int
    rejected: int
    offloaded: int
    links_created: int
    links_unresolved: int
    #: Beside the answer's keys.
    spans: int
    spans_of_unknown_projects: int
    out_of_scope: int
    recovered: int
    underway: int
    reasons: Mapping[str, int]
    #: Ids of the first refreshed items, and their fields that differed from what the span says.
    taken_back: Sequence[tuple[str, Sequence[str]]]

    @property
    def stale(self) -> int:
        """Items with other values than their span says, and links that an item lacks."""
        return self.refreshed + self.links_created

    def counts(self) -> dict[str, int]:
        """The counts under the names of the interface."""
        return {name: getattr(self, name) for name in _COUNTS}

    def all_counts(self) -> dict[str, int]:
        """All that was counted, by name."""
        return {name: getattr(self, name) for name in (*_COUNTS, *_REST)}


def account(connection: Connection, *, dry_run: bool) -> dict[str, int]:
    """Keep a row for everything that was found and is not stored; how many there are by reason."""
    connection.execute(_SQL["refused"])
    if not dry_run:
        with connection.transaction():
            connection.execute(_SQL["forget"])
            connection.execute(_SQL["reject"])
    return tally(connection, "SELECT reason, count(*) FROM refused GROUP BY reason ORDER BY reason")
