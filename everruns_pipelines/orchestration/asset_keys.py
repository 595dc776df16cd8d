"""The keys of assets: a table's name, behind the prefix that a project of others gave us."""

import dagster as dg

from everruns_pipelines.settings import Settings

# The asset that says how the derived data fares.
HEALTH = "pipeline_health"


def asset_key(settings: Settings, table: str) -> dg.AssetKey:
    """The key of the asset that stands for a table."""
    return dg.AssetKey([*settings.asset_prefix, table])
