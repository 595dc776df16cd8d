"""`serve`: the web server, fit for a network."""

import argparse
import re

from everruns_pipelines.commands.arguments import add_address, refuse_address
from everruns_pipelines.settings import Settings

HELP = "start the web server: the UI, GraphQL, the HTTP API, metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    add_address(parser)
    parser.add_argument(
        "--path-prefix", type=_prefix, default="", help="serve everything below /x", metavar="/x"
    )
    parser.add_argument("--read-only", action="store_true", help="launch and change nothing")


def run(options: argparse.Namespace, settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        Refusal: the address cannot be bound.
    """
    from everruns_pipelines.serve.app import Address
    from everruns_pipelines.serve.server import serve

    refuse_address(options.host, options.port)
    address = Address(options.host, options.port, options.path_prefix)
    serve(settings, address, read_only=options.read_only)


def _prefix(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", text):
        raise argparse.ArgumentTypeError("expected a path such as /x, without a slash at its end")
    return text
