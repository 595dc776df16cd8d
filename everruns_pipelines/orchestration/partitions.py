"""The one partitioning of every asset: UTC days, the running one included."""

import dagster as dg

from everruns_pipelines.settings import Settings


def day_partitions(settings: Settings) -> dg.DailyPartitionsDefinition:
    """UTC days from EVERRUNS_REPORTING_START up to and with today."""
    return dg.DailyPartitionsDefinition(
        start_date=settings.reporting_start.isoformat(), end_offset=1
    )
