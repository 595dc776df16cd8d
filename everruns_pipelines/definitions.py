"""The composition root: the one Definitions, and nothing else."""

import dagster as dg

from everruns_pipelines.postgres import PostgresResource
from everruns_pipelines.reporting.assets import fact_assets, fact_checks, source_assets
from everruns_pipelines.reporting.jobs import backfill_reporting, project_reporting
from everruns_pipelines.settings import Settings


def build_definitions(settings: Settings) -> dg.Definitions:
    """Everything that Dagster is to know, for the given settings."""
    return dg.Definitions(
        assets=[*source_assets(), *fact_assets(settings)],
        asset_checks=fact_checks(settings),
        jobs=[backfill_reporting, project_reporting],
        resources={
            "postgres": PostgresResource(settings),
            # Between the ops of a run nothing needs to be kept on disk.
            "mem_io_manager": dg.mem_io_manager,
        },
    )


defs = build_definitions(Settings.from_environment())
