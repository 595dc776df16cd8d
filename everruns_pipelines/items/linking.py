"""Makes the links that items name, once all items of a rebuild are in their table."""

from collections import Counter
from dataclasses import asdict

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.items.batches import Batch, batches, tally, undisturbed

_SQL = read_statements("everruns_pipelines.items", "linking.sql")


def link(connection: Connection, *, dry_run: bool) -> Counter[str]:
    """How many links were there to `create`, were `present`, or remain `unresolved`."""
    done = Counter[str]()
    for batch in batches(connection, None):
        done.update(_link_batch(connection, batch, dry_run=dry_run))
    return done


def _link_batch(connection: Connection, batch: Batch, *, dry_run: bool) -> dict[str, int]:
    """Write the links of one batch in one transaction."""
    return undisturbed(
        lambda: _link_batch_once(connection, batch, dry_run=dry_run),
        # The links are looked up in the transaction itself.
        lambda: None,
    )


def _link_batch_once(connection: Connection, batch: Batch, *, dry_run: bool) -> dict[str, int]:
    with connection.transaction():
        connection.execute("TRUNCATE planned_links")
        connection.execute(_SQL["plan"], {**asdict(batch), "dry_run": dry_run})
        planned = tally(connection, "SELECT state, count(*) FROM planned_links GROUP BY state")
        if not dry_run and "create" in planned:
            planned["create"] = connection.execute(_SQL["create"]).rowcount
    return planned
