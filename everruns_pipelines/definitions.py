"""The composition root: the one Definitions, and nothing else."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from everruns_pipelines.items.assets import item_assets, span_table
from everruns_pipelines.items.automation import (
    item_failures_sensor,
    item_schedules,
    materialize_items,
)
from everruns_pipelines.items.jobs import check_items, rebuild_items
from everruns_pipelines.operations.health import (
    health_checks,
    health_schedule,
    measure_health,
    pipeline_health,
)
from everruns_pipelines.operations.housekeeping import housekeeping, housekeeping_schedule
from everruns_pipelines.orchestration.resources import resources
from everruns_pipelines.reporting.assets import fact_assets, fact_checks, source_assets
from everruns_pipelines.reporting.automation import (
    materialize_reporting,
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


def build_definitions(
    settings: Settings, overrides: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """Everything that Dagster is to know, for the given settings and the parts that are on.

    Args:
        overrides: resources to use instead of the settings' own, by key; for tests.
    """
    with warnings.catch_warnings():
        # Single-run backfills: young, and chosen on purpose.
        warnings.simplefilter("ignore", dg.BetaWarning)
        parts = [_OF_PART[part](settings) for part in settings.parts]
    return dg.Definitions.merge(
        *parts,
        _operations(settings),
        dg.Definitions(
            resources={**resources(settings), **(overrides or {})},
            # A day costs two seconds in the run's own process, and twenty in one of its own.
            executor=dg.in_process_executor,
        ),
    )


def _reporting(settings: Settings) -> dg.Definitions:
    return dg.Definitions(
        assets=[*source_assets(), *fact_assets(settings)],
        asset_checks=fact_checks(settings),
        jobs=[backfill_reporting, project_reporting, materialize_reporting, check_reporting],
        sensors=[reporting_outbox_sensor],
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
    return dg.Definitions(
        assets=[pipeline_health(settings)],
        asset_checks=[health_checks(settings)],
        jobs=[measure_health, housekeeping(settings)],
        schedules=[housekeeping_schedule(settings), health_schedule],
    )


_OF_PART: Mapping[Part, Callable[[Settings], dg.Definitions]] = {
    "reporting": _reporting,
    "items": _items,
}
defs = build_definitions(Settings.from_environment())
