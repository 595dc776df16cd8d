"""`rebuild`: the job `rebuild_items`."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_dry_run, add_launch
from everruns_pipelines.commands.launch import run_job
from everruns_pipelines.settings import Settings

HELP = "rebuild the items of a session, or of runs, from their spans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `rebuild` takes."""
    parser.add_argument("--organization", required=True, help="slug or UUID")
    parser.add_argument("--workspace", required=True, help="slug or UUID")
    parser.add_argument("--project", required=True, help="slug or UUID")
    parser.add_argument("--session-id", help="a UUID; needed unless runs are given")
    parser.add_argument(
        "--run-id",
        action="append",
        dest="run_ids",
        metavar="RUN_ID",
        help="a run id, or a trace id as 32 hex digits; repeatable",
    )
    add_dry_run(parser)
    add_launch(parser)


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Run the job; how many items were processed, and all that was counted and named if verbose."""
    from everruns_pipelines.items.scope import RebuildRequest, resolve_project

    request = RebuildRequest(
        options.organization,
        options.workspace,
        options.project,
        options.session_id,
        tuple(options.run_ids or ()),
        options.dry_run,
    )
    request.check()
    if options.url is None:
        from everruns_pipelines.databases.postgres import ItemsPostgresDatabase
        from everruns_pipelines.items.database import check_platform

        with ItemsPostgresDatabase(settings).connect() as connection:
            check_platform(connection)
            resolve_project(connection, request)
    config = {
        "organization": options.organization,
        "workspace": options.workspace,
        "project": options.project,
        "session_id": options.session_id,
        "run_ids": options.run_ids,
        "dry_run": options.dry_run,
    }
    counts = run_job(options, settings, "rebuild_items", {"rebuild": config})["rebuild"]
    # What a dry run is for.
    is_told = options.verbose or options.dry_run
    return counts if is_told else {"processed": counts["processed"]}
