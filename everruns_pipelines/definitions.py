"""The composition root: the one Definitions, and nothing else."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from everruns_pipelines.orchestration.resources import resources
from everruns_pipelines.parts import definitions_of_parts
from everruns_pipelines.settings import Settings


def build_definitions(
    settings: Settings, overrides: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """Everything that Dagster is to know, for the given settings and the parts that are on.

    Args:
        overrides: resources to use instead of the settings' own, by key; for tests.
    """
    return dg.Definitions.merge(
        definitions_of_parts(settings),
        dg.Definitions(
            resources={**resources(settings), **(overrides or {})},
            # A day costs two seconds in the run's own process, and twenty in one of its own.
            executor=dg.in_process_executor,
        ),
    )


defs = build_definitions(Settings.from_environment())
