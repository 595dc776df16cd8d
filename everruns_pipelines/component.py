"""Our definitions in a Dagster project of others, by a `defs.yaml`:

    type: everruns_pipelines.component.EverrunsPipelinesComponent
    attributes:
      postgres_url: "{{ env.PLATFORM_POSTGRES_URL }}"
      parts: reporting
      prefix: everruns

See https://docs.dagster.io/guides/build/components and docs/component.md.
"""

from typing import Annotated, Any

import dagster as dg
from pydantic import Field

from everruns_pipelines.orchestration.resources import resources
from everruns_pipelines.parts import definitions_of_parts
from everruns_pipelines.settings import Settings

_OURS = {"prefix", "automation"}


class EverrunsPipelinesComponent(dg.Component, dg.Model, dg.Resolvable):
    """Keeps an agent platform's derived data, reporting facts and items, equal to its source.

    Each field but `prefix` and `automation` is the environment variable `EVERRUNS_...` of its name,
    and has its meaning and its default. The environment itself is not read.
    """

    prefix: Annotated[
        str | None,
        Field(
            pattern="^[A-Za-z_][A-Za-z0-9_]*$",
            description="First part of each asset key, and of each job's name: `everruns` makes "
            "`everruns/fact_turn` and `everruns_backfill_reporting`. Null for none.",
        ),
    ] = None
    automation: Annotated[
        bool, Field(description="Whether sensors and schedules are defined, which then run.")
    ] = True
    parts: Annotated[str | None, Field(description="`reporting`, `items`, or both.")] = None
    postgres_url: Annotated[
        str | None, Field(description="PostgreSQL with the platform's tables. A secret.")
    ] = None
    items_postgres_url: Annotated[
        str | None, Field(description="PostgreSQL with the items, if another. A secret.")
    ] = None
    clickhouse_dsn: Annotated[
        str | None, Field(description="ClickHouse with the spans. A secret.")
    ] = None
    object_store_url: Annotated[
        str | None, Field(description="Prefix under which offloaded items may be read.")
    ] = None
    spans_table: Annotated[str | None, Field(description="The span table.")] = None
    home: Annotated[
        str | None, Field(description="Where the embedded databases live, if they are used.")
    ] = None
    reporting_start: Annotated[
        str | None, Field(description="First day partition, 'YYYY-MM-DD'.")
    ] = None
    reporting_max_attempts: Annotated[
        int | None, Field(description="Failures in a row after which an outbox row is parked.")
    ] = None
    nightly_at: Annotated[str | None, Field(description="UTC time of day, 'HH:MM'.")] = None
    weekly_at: Annotated[str | None, Field(description="Such as 'Sun 02:00', UTC.")] = None
    purge_at: Annotated[str | None, Field(description="UTC time of day, 'HH:MM'.")] = None
    alert_urls: Annotated[
        str | None, Field(description="Apprise URLs, separated by white space. Secrets.")
    ] = None
    public_url: Annotated[
        str | None, Field(description="Where people see the UI, for links in alerts.")
    ] = None
    max_partitions_per_run: Annotated[
        int | None, Field(description="Days per run of a backfill of days; null for all in one.")
    ] = None
    linger_seconds: Annotated[
        int | None, Field(description="How long a run of the outbox sensor stays for more rows.")
    ] = None
    heal_seconds: Annotated[
        int | None, Field(description="Seconds between two looks for missing and stale facts.")
    ] = None
    outbox_keep_days: Annotated[
        int | None, Field(description="Days to keep completed outbox rows.")
    ] = None

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002
        """Everything of ours, for the settings in the fields.

        Raises:
            SettingsError: a field is wrong; names its variable and what is expected.
        """
        settings = self._settings()
        definitions: Any = definitions_of_parts(settings)
        jobs = self._jobs(definitions)
        return dg.Definitions(
            assets=definitions.assets,
            asset_checks=definitions.asset_checks,
            jobs=[*jobs.values()],
            schedules=[
                one.with_updated_job(jobs[one.job_name])
                for one in definitions.schedules
                if self.automation
            ],
            sensors=[
                one.with_updated_jobs([jobs[target.job_name] for target in one.targets])
                if one.targets
                else one
                for one in definitions.sensors
                if self.automation
            ],
            resources=resources(settings),
        )

    def _settings(self) -> Settings:
        given = {
            f"EVERRUNS_{name.upper()}": str(value)
            for name, value in self.model_dump(exclude=_OURS, exclude_none=True).items()
        }
        return Settings.from_environment(given).model_copy(
            update={"asset_prefix": (self.prefix,) if self.prefix else (), "is_guest": True}
        )

    def _jobs(self, definitions: Any) -> dict[str, Any]:
        """Our jobs under their names in that project, by their names in ours.

        A group of the project may have the name of one of ours: jobs select none of its assets.
        """
        made = [one for one in definitions.assets if isinstance(one, dg.AssetsDefinition)]
        ours = dg.AssetSelection.assets(*made)
        renamed: dict[str, Any] = {}
        for job in definitions.jobs:
            name = f"{self.prefix}_{job.name}" if self.prefix else job.name
            renamed[job.name] = (
                _renamed(job.graph, name).to_job(  # pyright: ignore[reportUnknownMemberType]
                    name, job.description, executor_def=job.executor_def, tags=job.tags
                )
                if isinstance(job, dg.JobDefinition)
                else dg.define_asset_job(  # pyright: ignore[reportUnknownMemberType]
                    name,
                    selection=job.selection & ours,
                    config=job.config,
                    description=job.description,
                    tags=job.tags,
                    executor_def=job.executor_def,
                )
            )
        return renamed


def _renamed(graph: dg.GraphDefinition, name: str) -> dg.GraphDefinition:
    """The same graph: in a project no two may have one name, whatever their jobs are called."""
    return dg.GraphDefinition(
        name,
        description=graph.description,
        node_defs=graph.node_defs,
        dependencies=graph.dependencies,
    )
