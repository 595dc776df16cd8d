"""A run is launched once, also where two daemons take it from the queue at the same moment.

Dagster forbids two daemons, and lets them work: each looks whether a run is queued, then launches
it.
"""

from collections.abc import Generator
from contextlib import contextmanager

from dagster import DagsterInstance
from dagster_postgres import PostgresRunStorage
from sqlalchemy import text

# On a run that has been launched: its own id, since a retry takes over the tags of the run before.
LAUNCHED_TAG = "everruns/launched"

# Two runs of the same hash wait for each other, for a moment.
_LOCK = text("SELECT pg_advisory_lock(hashtextextended(:run_id, 0))")
_UNLOCK = text("SELECT pg_advisory_unlock(hashtextextended(:run_id, 0))")


@contextmanager
def is_to_be_launched(instance: DagsterInstance, run_id: str) -> Generator[bool]:
    """Whether nobody has launched the run; whoever else asks meanwhile waits.

    The run counts as launched once what is done here has not failed.
    """
    storage = instance.run_storage
    if not isinstance(storage, PostgresRunStorage):
        yield True  # no other has such locks
        return
    with storage.connect() as connection:
        connection.execute(_LOCK, {"run_id": run_id})
        try:
            run = instance.get_run_by_id(run_id)
            is_first = run is not None and run.tags.get(LAUNCHED_TAG) != run_id
            yield is_first
            if is_first:
                instance.add_run_tags(run_id, {LAUNCHED_TAG: run_id})
        finally:
            connection.execute(_UNLOCK, {"run_id": run_id})
