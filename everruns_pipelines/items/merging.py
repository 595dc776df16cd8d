"""Brings the table `items` in line with the valid envelopes, batch by batch."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import count

from everruns_pipelines.databases.clickhouse import Log
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.batches import Batch, batches, tally, undisturbed

# Refreshed items that are named in an account.
MOST_TOLD = 100

_SQL = read_statements("everruns_pipelines.items", "merging.sql")


@dataclass(frozen=True)
class Merged:
    """What became of the items.

    Args:
        counts: how many were an `insert`, a `refresh`, or `unchanged`.
        taken_back: the first `MOST_TOLD` refreshed items: their ids, and the fields that differed
            from what the span says.
        underway: how many are neither: they may still be on their way to the platform.
    """

    counts: Counter[str] = field(default_factory=Counter[str])
    taken_back: list[tuple[str, list[str]]] = field(default_factory=list[tuple[str, list[str]]])
    underway: int = 0


def merge(
    connection: Connection, log: Log, *, dry_run: bool, grace: timedelta | None = None
) -> Merged:
    """Bring the table in line, or tell what that would take.

    Args:
        grace: how long after its report an item may be missing; None for no time at all.
    """
    connection.execute(_SQL["refuse"])
    connection.execute(_SQL["choose"])
    underway = 0 if grace is None else connection.execute(_SQL["leave"], {"grace": grace}).rowcount
    done = Merged(underway=underway)
    # Now that it is full; and that refs hardly repeat decides how they are compared.
    connection.execute("CREATE INDEX ON chosen (candidate)")
    connection.execute("ANALYZE chosen (candidate, round, ref)")
    for number in count():
        connection.execute(_SQL["refs"], {"round": number})
        for batch in batches(connection, number):
            done.counts.update(_merge_batch(connection, batch, dry_run=dry_run))
            most = MOST_TOLD - len(done.taken_back)
            done.taken_back.extend(connection.execute(_SQL["taken_back"], {"most": most}))
            log(f"{done.counts.total()} items {'compared' if dry_run else 'done'}")
        if not connection.execute(_SQL["revive"], {"round": number + 1}).rowcount:
            break
    return done


def _merge_batch(connection: Connection, batch: Batch, *, dry_run: bool) -> dict[str, int]:
    """Write the items of one batch in one transaction."""
    return undisturbed(
        lambda: _merge_batch_once(connection, batch, dry_run=dry_run),
        # Whoever came between may hold a ref now.
        lambda: connection.execute(_SQL["refs"], {"round": batch.round}),
    )


def _merge_batch_once(connection: Connection, batch: Batch, *, dry_run: bool) -> dict[str, int]:
    with connection.transaction():
        connection.execute("TRUNCATE planned")
        connection.execute(_SQL["plan"], asdict(batch))
        planned = tally(connection, "SELECT action, count(*) FROM planned GROUP BY action")
        if not dry_run:
            if "insert" in planned:
                connection.execute(_SQL["insert"])
            if "refresh" in planned:
                connection.execute(_SQL["refresh"])
            connection.execute(_SQL["stored"], asdict(batch))
    return planned
