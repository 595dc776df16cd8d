"""What each part of the project brings to Dagster: its assets, checks, jobs, sensors, schedules."""

import warnings
from collections.abc import Callable, Mapping

import dagster as dg

from everruns_pipelines.items.assets import item_assets, span_table
from everruns_pipelines.items.automation import (
    item_failures_sensor,
    item_schedules,
    materialize_items,
)
from everruns_pipelines.items.jobs import check_items, rebuild_items
from everruns_pipelines.operations.alert_sensor import alert_sensors
from everruns_pipelines.operations.health import (
    health_checks,
    health_schedule,
    measure_health,
    pipeline_health,
)
from everruns_pipelines.operations.housekeeping import housekeeping, housekeeping_schedule
from everruns_pipelines.reporting.assets import fact_assets, fact_checks, source_assets
from everruns_pipelines.reporting.automation import (
    materialize_reporting,
    reporting_healing_sensor,
    reporting_outbox_sensor,
    reporting_schedules,
)
from everruns_pipelines.reporting.jobs import (
    backfill_reporting,
    check_reporting,
    project_reporting,
)
from everruns_pipelines.settings import Part, Settings

# Dagster hands its sensors a young parameter when it resolves them; nobody here gives one.
warnings.filterwarnings("ignore", ".*owners.*SensorDefinition", dg.BetaWarning)


def definitions_of_parts(settings: Settings) -> dg.Definitions:
    """What the parts that are on define, and what serves them both. Resources are not among it."""
    with warnings.catch_warnings():
        # Single-run backfills: young, and chosen on purpose.
        warnings.simplefilter("ignore", dg.BetaWarning)
        parts = [_OF_PART[part](settings) for part in settings.parts]
    definitions = dg.Definitions.merge(*parts, _operations(settings))
    return dg.Definitions.merge(
        definitions, dg.Definitions(sensors=alert_sensors(settings, definitions))
    )


def _reporting(settings: Settings) -> dg.Definitions:
    return dg.Definitions(
        assets=[*source_assets(settings), *fact_assets(settings)],
        asset_checks=fact_checks(settings),
        jobs=[backfill_reporting, project_reporting, materialize_reporting, check_reporting],
        sensors=[reporting_outbox_sensor, reporting_healing_sensor],
        schedules=reporting_schedules(settings),
    )


def _items(settings: Settings) -> dg.Definitions:
    items = item_assets(settings)
    return dg.Definitions(
        assets=[span_table(settings), items.asset],
        asset_checks=[items.checks],
        jobs=[rebuild_items, materialize_items, check_items],
        sensors=[item_failures_sensor],
        schedules=item_schedules(settings),
    )


def _operations(settings: Settings) -> dg.Definitions:
    health = dg.Definitions(
        assets=[pipeline_health(settings)],
        asset_checks=[health_checks(settings)],
        jobs=[measure_health],
        schedules=[health_schedule],
    )
    if settings.is_guest and "reporting" not in settings.parts:
        return health  # nothing to keep: neither an outbox nor run records
    return dg.Definitions.merge(
        health,
        dg.Definitions(jobs=[housekeeping(settings)], schedules=[housekeeping_schedule(settings)]),
    )


_OF_PART: Mapping[Part, Callable[[Settings], dg.Definitions]] = {
    "reporting": _reporting,
    "items": _items,
}
