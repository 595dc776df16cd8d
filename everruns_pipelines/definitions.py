"""The composition root: the one Definitions, and nothing else."""

import warnings

import dagster as dg

from everruns_pipelines.postgres import PostgresResource
from everruns_pipelines.reporting.assets import fact_assets, fact_checks, source_assets
from everruns_pipelines.reporting.jobs import backfill_reporting, project_reporting
from everruns_pipelines.settings import Settings


def build_definitions(settings: Settings) -> dg.Definitions:
    """Everything that Dagster is to know, for the given settings."""
    with warnings.catch_warnings():
        # Single-run backfills and partitioned checks: young, and chosen on purpose.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        assets = fact_assets(settings)
        checks = fact_checks(settings)
    return dg.Definitions(
        assets=[*source_assets(), *assets],
        asset_checks=checks,
        jobs=[backfill_reporting, project_reporting],
        resources={
            "postgres": PostgresResource(settings),
            # Between the ops of a run nothing needs to be kept on disk.
            "mem_io_manager": dg.mem_io_manager,
        },
    )


defs = build_definitions(Settings.from_environment())
