"""Brings the table `items` in line with the valid envelopes, batch by batch."""

from collections import Counter
from dataclasses import asdict
from itertools import count

from everruns_pipelines.databases.clickhouse import Log
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.batches import Batch, batches, tally, undisturbed

_SQL = read_statements("everruns_pipelines.items", "merging.sql")


def merge(connection: Connection, log: Log, *, dry_run: bool) -> Counter[str]:
    """How many items were an `insert`, a `refresh`, or `unchanged`."""
    done = Counter[str]()
    connection.execute(_SQL["choose"])
    connection.execute("ANALYZE chosen")
    for number in count():
        connection.execute(_SQL["refs"], {"round": number})
        for batch in batches(connection, number):
            done.update(_merge_batch(connection, batch, dry_run=dry_run))
            log(f"{done.total()} items done")
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
