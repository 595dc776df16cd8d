"""`erase`: removes what is derived from a session that is gone."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_dry_run
from everruns_pipelines.settings import Settings

HELP = "remove what is derived from a session that is gone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `erase` takes."""
    parser.add_argument("--session-id", required=True, help="the session, a UUID")
    add_dry_run(parser)


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Erase; the rows removed, by table."""
    from everruns_pipelines.databases.postgres import PostgresDatabase
    from everruns_pipelines.reporting.database import prepare
    from everruns_pipelines.reporting.erasure import check_session_id, erase

    session_id = check_session_id(options.session_id)
    with PostgresDatabase(settings).connect() as connection:
        prepare(connection)
        return erase(connection, session_id, dry_run=options.dry_run)
