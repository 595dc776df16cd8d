"""`project`: the job `project_reporting`."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_launch, add_org_id, number
from everruns_pipelines.commands.launch import refuse_early, run_job
from everruns_pipelines.settings import Settings

HELP = "make the facts that due rows of the outbox ask for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `project` takes."""
    add_org_id(parser)
    parser.add_argument(
        "--max-rows",
        type=number,
        help="the most outbox rows to take; all that are due if not given",
    )
    add_launch(parser)


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Run the job; its counts."""
    from everruns_pipelines.reporting.drain import check

    refuse_early(
        options,
        settings,
        lambda connection: check(connection, org_id=options.org_id, max_rows=options.max_rows),
    )
    ops = {"project": {"org_id": options.org_id, "max_rows": options.max_rows}}
    return run_job(options, settings, "project_reporting", ops)["project"]
