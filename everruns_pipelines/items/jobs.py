"""The job `rebuild_items`: an operator names a session or runs and gets their items back.

Run config is in `RebuildConfig`. See https://docs.dagster.io/guides/build/ops.
"""

import dagster as dg
from pydantic import Field

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import ItemsPostgresDatabase
from everruns_pipelines.items.assets import as_metadata, items_failures
from everruns_pipelines.items.scope import RebuildRequest
from everruns_pipelines.orchestration.checks import check_job


class RebuildConfig(dg.Config):
    """Whose items to rebuild: those of a session, of some runs, or of both together."""

    organization: str = Field(description="Slug or UUID.")
    workspace: str = Field(description="Slug or UUID, in that organization.")
    project: str = Field(description="Slug or UUID, in that workspace.")
    session_id: str | None = Field(
        None, description="The session, a UUID; needed unless run_ids are given."
    )
    run_ids: list[str] | None = Field(
        None, description="Values of dreadnode.run.id, or trace ids as 32 hex digits."
    )
    dry_run: bool = Field(False, description="Only tell what would change: write nothing.")

    def request(self) -> RebuildRequest:
        """The request that this config spells."""
        return RebuildRequest(
            organization=self.organization,
            workspace=self.workspace,
            project=self.project,
            session_id=self.session_id,
            run_ids=tuple(self.run_ids or ()),
            dry_run=self.dry_run,
        )


@dg.op(
    name="everruns_rebuild",
    description="Bring items back to what their spans say.",
    out=dg.Out(dict[str, int], io_manager_key="everruns_io_manager"),
    pool="clickhouse",
)
def rebuild_op(
    context: dg.OpExecutionContext,
    config: RebuildConfig,
    everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
    everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
) -> dict[str, int]:
    """Rebuild and return the counts of the interface, which are the output's metadata too."""
    from everruns_pipelines.items.rebuild import rebuild

    with items_failures():
        done = rebuild(
            everruns_items_postgres, everruns_clickhouse, config.request(), context.log.info
        )
    context.add_output_metadata(as_metadata(done))
    return done.counts()


@dg.job(  # pyright: ignore[reportUnknownMemberType]
    executor_def=dg.in_process_executor,
    description="Rebuild the items of a session or of runs from the spans they were reported in.",
    tags={"domain": "items"},
)
def rebuild_items() -> None:
    """The op `rebuild` alone, in the run's own process."""
    rebuild_op.alias("rebuild")()  # pyright: ignore[reportUnknownMemberType]


check_items = check_job("check_items", "items", ["items"])
