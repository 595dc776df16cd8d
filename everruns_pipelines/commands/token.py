"""`token`: a new token of the HTTP API."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_org_id
from everruns_pipelines.settings import Settings

HELP = "make a token of the HTTP API, and the line for EVERRUNS_API_TOKENS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `token` takes."""
    parser.add_argument("name", metavar="NAME", help="whose it is; shown in logs and on runs")
    parser.add_argument(
        "--scope",
        action="append",
        dest="scopes",
        required=True,
        metavar="SCOPE",
        help="reports:admin, items:admin or metrics:read; repeatable",
    )
    add_org_id(parser)
    parser.add_argument(
        "--organization", help="slug or UUID of the one whose items it reaches; all if not given"
    )


def run(options: argparse.Namespace, _: Settings) -> dict[str, Any]:
    """The token, which is told this once, and the line that makes it known."""
    from everruns_pipelines.serve.tokens import Grant, make_token

    token, line = make_token(
        Grant(options.name, frozenset(options.scopes), options.org_id, options.organization)
    )
    return {"token": token, "line": line}
