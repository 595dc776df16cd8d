"""`unpark`: gives rows of the outbox that were given up another attempt."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_dry_run, add_org_id
from everruns_pipelines.settings import Settings

HELP = "give parked rows of the outbox another attempt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `unpark` takes."""
    add_org_id(parser)
    parser.add_argument(
        "--source-type",
        metavar="TYPE",
        help="event, session, llm_generation or usage_ledger; all if not given",
    )
    add_dry_run(parser)


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Make them due; how many, in all and by source."""
    from everruns_pipelines.databases.postgres import PostgresDatabase
    from everruns_pipelines.reporting.database import prepare
    from everruns_pipelines.reporting.outbox import check_source_type, unpark

    check_source_type(options.source_type)
    with PostgresDatabase(settings).connect() as connection:
        prepare(connection)
        return unpark(connection, options.org_id, options.source_type, dry_run=options.dry_run)
