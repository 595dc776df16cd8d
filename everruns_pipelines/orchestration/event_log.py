"""What Dagster's storage may forget, by set: its own way reads every run to learn what it holds.

The newest materialization and the newest check of each partition stay, and so do the runs that hold
them, with their beginning and end. Everything else goes by age.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import dagster as dg

_FINISHED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]
_AT_ONCE = 500  # runs per statement


def purge_runs(instance: dg.DagsterInstance, before: datetime) -> int:
    """Forget runs that were made before then and have ended; how many.

    Of those that hold something newest, only the other events are forgotten.
    """
    filters = dg.RunsFilter(statuses=_FINISHED, created_before=before)
    old = instance.run_storage.get_run_ids(filters)
    log: Any = instance.event_log_storage
    with log.index_connection() as connection:
        holders = {run_id for (run_id,) in connection.execute(_holders())}
        for some in _batches([run_id for run_id in old if run_id in holders]):
            _forget_events(connection, some, but_newest=True)
        gone = [run_id for run_id in old if run_id not in holders]
        for some in _batches(gone):
            _forget_events(connection, some, but_newest=False)
    runs: Any = instance.run_storage
    with runs.connect() as connection:
        for some in _batches(gone):
            _forget_runs(connection, some)
    for run_id in gone:
        instance.compute_log_manager.delete_logs(prefix=[run_id])
    return len(gone)


def _batches(run_ids: Sequence[str]) -> list[Sequence[str]]:
    return [run_ids[start : start + _AT_ONCE] for start in range(0, len(run_ids), _AT_ONCE)]


def _newest_materializations() -> Any:
    from dagster._core.storage.event_log import schema
    from sqlalchemy import func, select

    events = schema.SqlEventLogStorageTable
    return (
        select(func.max(events.c.id))
        .where(events.c.dagster_event_type == dg.DagsterEventType.ASSET_MATERIALIZATION.value)
        .group_by(events.c.asset_key, events.c.partition)
    )


def _newest_checks() -> Any:
    from dagster._core.storage.event_log import schema
    from sqlalchemy import func, select

    checks = schema.AssetCheckExecutionsTable
    return select(func.max(checks.c.id)).group_by(
        checks.c.asset_key, checks.c.check_name, checks.c.partition
    )


def _holders() -> Any:
    """The runs that hold something newest."""
    from dagster._core.storage.event_log import schema
    from sqlalchemy import select

    checks, events = schema.AssetCheckExecutionsTable, schema.SqlEventLogStorageTable
    return (
        select(events.c.run_id)
        .where(events.c.id.in_(_newest_materializations()))
        .union(select(checks.c.run_id).where(checks.c.id.in_(_newest_checks())))
    )


def _forget_events(connection: Any, run_ids: Sequence[str], *, but_newest: bool) -> None:
    from dagster._core.events import PIPELINE_EVENTS
    from dagster._core.storage.event_log import schema
    from sqlalchemy import func, select

    events, tags = schema.SqlEventLogStorageTable, schema.AssetEventTagsTable
    checks = schema.AssetCheckExecutionsTable
    of_runs: list[Any] = [events.c.run_id.in_(run_ids)]
    of_checks: list[Any] = [checks.c.run_id.in_(run_ids)]
    if but_newest:
        kind = func.coalesce(events.c.dagster_event_type, "")  # lines of the log have none
        of_runs += [
            kind.not_in([event_type.value for event_type in PIPELINE_EVENTS]),
            events.c.id.not_in(_newest_materializations()),
            events.c.id.not_in(
                select(func.coalesce(checks.c.evaluation_event_storage_id, 0)).where(
                    checks.c.id.in_(_newest_checks())
                )
            ),
        ]
        of_checks.append(checks.c.id.not_in(_newest_checks()))
    doomed = select(events.c.id).where(*of_runs)
    connection.execute(tags.delete().where(tags.c.event_id.in_(doomed)))
    connection.execute(events.delete().where(*of_runs))
    connection.execute(checks.delete().where(*of_checks))


def _forget_runs(connection: Any, run_ids: Sequence[str]) -> None:
    from dagster._core.storage.runs.schema import RunsTable, RunTagsTable

    connection.execute(RunTagsTable.delete().where(RunTagsTable.c.run_id.in_(run_ids)))
    connection.execute(RunsTable.delete().where(RunsTable.c.run_id.in_(run_ids)))
