"""The one partitioning of every asset, UTC days, and which of them a run is of."""

from collections.abc import Mapping
from datetime import date, timedelta

import dagster as dg

from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings

_DAY = "dagster/partition"
_FIRST = "dagster/asset_partition_range_start"
_LAST = "dagster/asset_partition_range_end"


def day_partitions(settings: Settings) -> dg.DailyPartitionsDefinition:
    """UTC days from EVERRUNS_REPORTING_START up to and with today."""
    return dg.DailyPartitionsDefinition(
        start_date=settings.reporting_start.isoformat(), end_offset=1
    )


def backfill_policy(settings: Settings) -> dg.BackfillPolicy:
    """How Dagster's backfill of many days is cut into runs: one run by default."""
    most = settings.max_partitions_per_run
    return dg.BackfillPolicy.single_run() if most is None else dg.BackfillPolicy.multi_run(most)


def day_range_tags(settings: Settings, last: date, days: int) -> Mapping[str, str]:
    """Tags that make a run cover the `days` partitions up to and with `last`, all in one run."""
    first = max(settings.reporting_start, last - timedelta(days=days - 1))
    return {_FIRST: first.isoformat(), _LAST: last.isoformat()}


def days_of_run(run: dg.DagsterRun, partitions: dg.DailyPartitionsDefinition) -> list[date]:
    """The days that the run's tags name: one, or a range. Empty if it is of no partition.

    Raises:
        Refusal: a day is not a partition, or the range ends before it begins. Dagster checks a
            single day, but not the ends of a range.
    """
    first = run.tags.get(_FIRST) or run.tags.get(_DAY)
    if first is None:
        return []
    last = run.tags.get(_LAST) or first
    for key in (first, last):
        if not partitions.has_partition_key(key):
            oldest, newest = (
                partitions.get_first_partition_key(),
                partitions.get_last_partition_key(),
            )
            raise Refusal(f"partition: expected a day from {oldest} to {newest}, got {key[:40]}")
    if first > last:
        raise Refusal(
            f"partition: expected the first day of the range first, got {first} to {last}"
        )
    keys = partitions.get_partition_keys_in_range(dg.PartitionKeyRange(first, last))
    return [date.fromisoformat(key) for key in keys]


def days_to_materialize(run: dg.DagsterRun, partitions: dg.DailyPartitionsDefinition) -> list[date]:
    """The same for an asset, of which nothing but days can be materialized.

    Raises:
        Refusal: also if the run is of no partition. Dagster launches it all the same.
    """
    days = days_of_run(run, partitions)
    if not days:
        raise Refusal("partition: expected a day, or a range of days, to materialize; got none")
    return days
