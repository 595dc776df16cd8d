"""`backfill`: the job `backfill_reporting`."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_dry_run, add_launch, add_org_id, number
from everruns_pipelines.commands.launch import refuse_early, run_job
from everruns_pipelines.settings import Settings

HELP = "find sources whose facts are missing or stale, enqueue and project them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `backfill` takes."""
    parser.add_argument(
        "--limit",
        type=number,
        default=1000,
        help="the most sources to enqueue: 1 to 10000, default 1000",
    )
    add_org_id(parser)
    parser.add_argument(
        "--source-type",
        action="append",
        dest="source_types",
        metavar="TYPE",
        help="event, session, llm_generation or usage_ledger; repeatable; all if not given",
    )
    add_dry_run(parser)
    add_launch(parser)


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Run the job; the counts of `enqueue`, and of `project` too if verbose."""
    from everruns_pipelines.reporting.backfill import BackfillRequest, check

    request = BackfillRequest(options.limit, options.org_id, options.source_types, options.dry_run)
    refuse_early(options, settings, lambda connection: check(connection, request))
    outputs = run_job(
        options,
        settings,
        "backfill_reporting",
        {
            "enqueue": {
                "limit": options.limit,
                "org_id": options.org_id,
                "source_types": options.source_types,
                "dry_run": options.dry_run,
            },
            "project": {"org_id": options.org_id},
        },
    )
    return {**outputs["enqueue"], **(outputs if options.verbose else {})}
