"""The jobs `backfill_reporting` and `project_reporting`, and the ops that they are made of.

Run config is typed here. What a value may be is judged by the domain, before anything is touched.
In a job an op goes by its plain name; its definition begins with `everruns_`, so that it collides
with none of a project that takes our definitions in.
See https://docs.dagster.io/guides/build/jobs.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, cast

import dagster as dg
from pydantic import Field

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.asset_keys import asset_key
from everruns_pipelines.orchestration.checks import check_job
from everruns_pipelines.orchestration.code_server import told_when_replaced
from everruns_pipelines.orchestration.damage import damage, no_damage
from everruns_pipelines.orchestration.failures import told_plainly
from everruns_pipelines.orchestration.partitions import day_partitions
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.reporting.backfill import BackfillRequest, Found
    from everruns_pipelines.reporting.drain import Drained

# So that telling the progress costs little, however much is due.
_MOST_COUNTED = 100_000
_TELL_SECONDS = 2
_TELL_LINGERING_SECONDS = 300
# What of a day's counts is news of it.
_CHANGES = ("inserted", "refreshed", "removed", "rejected")


class EnqueueConfig(dg.Config):
    """Which missing facts to enqueue, and how many."""

    limit: int = Field(
        1000, description="The most outbox rows to enqueue, over all source types: 1 to 10000."
    )
    org_id: int | None = Field(None, description="One organization; null for all of them.")
    source_types: list[str] | None = Field(
        None,
        description="Some of event, session, llm_generation, usage_ledger; null for all.",
    )
    dry_run: bool = Field(
        False, description="Only count what would be enqueued: write nothing, project nothing."
    )


class ProjectConfig(dg.Config):
    """Which outbox rows to project, and how many. Only rows that are due are taken."""

    org_id: int | None = Field(None, description="One organization; null for all of them.")
    batch_size: int = Field(
        5000, description="The most outbox rows of one transaction: 1 to 100000."
    )
    max_rows: int | None = Field(
        None, description="The most outbox rows to project; null for all that are due."
    )
    linger_seconds: int = Field(
        0,
        description="How many seconds to stay and wait for more rows to become due: 0 to 3600. "
        "With 0 the run projects what was due when it began, and ends.",
    )


@dg.op(
    name="everruns_enqueue",
    out={
        "result": dg.Out(dict[str, int], io_manager_key="everruns_io_manager"),
        "drain": dg.Out(dg.Nothing, is_required=False),
    },
    pool="postgres",
)
def enqueue_op(
    context: dg.OpExecutionContext,
    config: EnqueueConfig,
    everruns_postgres: dg.ResourceParam[PostgresDatabase],
) -> Iterator[dg.Output[dict[str, int]] | dg.AssetCheckEvaluation | dg.Output[None]]:
    """Enqueue sources whose facts are missing or stale, up to the limit. Source types take turns,
    so that none waits for another; of each the oldest go first.
    """
    from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
    from everruns_pipelines.reporting.backfill import check as check_request
    from everruns_pipelines.reporting.database import check_platform, prepare
    from everruns_pipelines.reporting.drain import check

    request = BackfillRequest(config.limit, config.org_id, config.source_types, config.dry_run)
    found: list[Found] = []
    with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
        check_platform(connection)
        check_request(connection, request)
        check(connection, **_config_of_project(context))
        prepare(connection)
        context.log.info("Looking for sources whose facts are missing or stale")
        counts = enqueue(connection, request, tell=found.append)
    by_type = ", ".join(f"{rows} {name}" for name, rows in counts.items() if name != "enqueued")
    context.log.info(
        f"{counts['enqueued']} {'would be' if config.dry_run else 'are'} enqueued: {by_type}"
    )
    yield dg.Output(counts, "result", metadata=dict(counts))
    if not config.dry_run:
        yield from _judgement(context, everruns_postgres.settings, request, found)
        yield dg.Output(None, "drain")


def _judgement(
    context: dg.OpExecutionContext,
    settings: Settings,
    request: "BackfillRequest",
    found: "Sequence[Found]",
) -> Iterator[dg.AssetCheckEvaluation]:
    """What `pipeline_health` says of this run: what it heals, or that nothing is damaged."""
    missing = [one for by_type in found for one in by_type.values()]
    damaged = sum(one.damaged for one in missing)
    if damaged:
        oldest = min(one.oldest for one in missing if one.damaged and one.oldest)
        yield damage(settings, damaged, oldest, context.run_id)
    elif request.is_of_everything and sum(one.sources for one in missing) < request.limit:
        yield from no_damage(context.instance, settings)


@dg.op(
    name="everruns_project",
    ins={"after": dg.In(dg.Nothing)},
    out=dg.Out(dict[str, int], io_manager_key="everruns_io_manager"),
    # Not the pool of who works on PostgreSQL for a while and ends: this one may linger.
    pool="outbox",
)
def project_op(
    context: dg.OpExecutionContext,
    config: ProjectConfig,
    everruns_postgres: dg.ResourceParam[PostgresDatabase],
) -> dict[str, int]:
    """Project what is due in the outbox into the facts, batch by batch."""
    from everruns_pipelines.reporting.database import check_platform, prepare
    from everruns_pipelines.reporting.drain import Drained, check, drain_in_parallel

    with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
        check_platform(connection)
        check(
            connection,
            org_id=config.org_id,
            batch_size=config.batch_size,
            max_rows=config.max_rows,
            linger_seconds=config.linger_seconds,
        )
        prepare(connection)
    # Not tried again: its counts would be those of the last attempt. What is due stays due.
    with (
        told_plainly(Refusal.as_problem_details, retries=0),
        everruns_postgres.connect() as connection,
    ):
        drained = Drained()
        stop = Event()
        batches = drain_in_parallel(
            everruns_postgres,
            org_id=config.org_id,
            batch_size=config.batch_size,
            max_rows=config.max_rows,
            linger_seconds=config.linger_seconds,
            stop=stop,
        )
        try:
            with (
                told_when_replaced(context.run, stop),
                _ended_with_its_machine(context, config),
                closing(batches),
            ):
                _follow(context, config, connection, drained, batches)
        finally:
            _report(context, everruns_postgres, drained)
    context.add_output_metadata(drained.result())
    return drained.result()


def _follow(
    context: dg.OpExecutionContext,
    config: ProjectConfig,
    connection: Connection,
    drained: "Drained",
    batches: "Iterable[Drained]",
) -> None:
    """Add up what the batches do, and tell it now and then: each line is kept for a month."""
    pause = _TELL_LINGERING_SECONDS if config.linger_seconds else _TELL_SECONDS
    told_at, told = 0.0, 0
    for batch in batches:
        drained.add(batch)
        if monotonic() >= told_at + pause:
            context.log.info(_progress(connection, config, drained))
            told_at, told = monotonic(), drained.claimed
    if drained.claimed > told:
        context.log.info(_progress(connection, config, drained))


@contextmanager
def _ended_with_its_machine(
    context: dg.OpExecutionContext, config: ProjectConfig
) -> Generator[None]:
    """A run that lingers ends in order when its process is told to, unless somebody has terminated
    it: what it has left is still due.
    """
    try:
        yield
    except dg.DagsterExecutionInterruptedError:
        run = context.instance.get_run_by_id(context.run_id)
        is_terminated = run is None or run.status == dg.DagsterRunStatus.CANCELING
        if not config.linger_seconds or is_terminated:
            raise


def _config_of_project(context: dg.OpExecutionContext) -> dict[str, int]:
    """What the op `project` of this run is given: refused before anything is enqueued."""
    ops = cast("dict[str, dict[str, dict[str, object]]]", context.run.run_config.get("ops", {}))
    given = ops.get("project", {}).get("config", {})
    return {name: value for name, value in given.items() if isinstance(value, int)}


def _progress(connection: Connection, config: ProjectConfig, drained: "Drained") -> str:
    """What is done, and how much of what this run may claim is due, at work or not."""
    # Rows that are parked unseen count as claimed, and are none of the allowed ones.
    allowed = (
        _MOST_COUNTED if config.max_rows is None else max(0, config.max_rows - drained.claimed)
    )
    row = connection.execute(
        "SELECT count(*) FROM (SELECT FROM reporting_outbox"
        " WHERE status IN ('pending', 'failed') AND next_attempt_at <= now()"
        " AND (%(org_id)s::bigint IS NULL OR org_id = %(org_id)s) LIMIT %(most)s) AS due",
        {"org_id": config.org_id, "most": min(allowed, _MOST_COUNTED)},
    ).fetchone()
    remaining = 0 if row is None else int(row[0])
    more = "more than " if remaining == _MOST_COUNTED else ""
    return f"{drained.claimed} rows claimed, {drained.failed} failed; {more}{remaining} remain"


def _report(context: dg.OpExecutionContext, postgres: PostgresDatabase, drained: "Drained") -> None:
    """Report a materialization for each fact and day that was changed, so that the partitions view
    of the UI is true. Days before the first partition are not in that view, nor is any that no
    partition can be: PostgreSQL's times are allowed to be infinite.
    """
    from everruns_pipelines.reporting.reconcile import count_rows

    partitions = day_partitions(postgres.settings)
    counts = drained.outcome.counts
    touched = [
        (table, day)
        for (table, day), of_day in sorted(counts.items())
        if partitions.has_partition_key(day) and any(of_day[what] for what in _CHANGES)
    ]
    if not touched:
        return
    with postgres.connect() as connection:
        rows = count_rows(connection, touched)
    for table, day in touched:
        context.log_event(
            dg.AssetMaterialization(
                asset_key(postgres.settings, table),
                partition=day,
                metadata={
                    **counts[table, day],
                    "materialized": "rows of the outbox",
                    "dagster/partition_row_count": rows[table, day],
                },
            )
        )


@dg.job(executor_def=dg.in_process_executor)  # pyright: ignore[reportUnknownMemberType]
def backfill_reporting() -> None:
    """Enqueue what is missing, up to a limit, and project it while you watch."""
    _, after = enqueue_op.alias("enqueue")()  # pyright: ignore[reportUnknownMemberType]
    project_op.alias("project")(after)  # pyright: ignore[reportUnknownMemberType]


@dg.job(executor_def=dg.in_process_executor)  # pyright: ignore[reportUnknownMemberType]
def project_reporting() -> None:
    """Project what is due in the outbox."""
    project_op.alias("project")()  # pyright: ignore[reportUnknownMemberType]


check_reporting = check_job("check_reporting", "reporting", (fact.table for fact in FACTS))
