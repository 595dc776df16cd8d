"""`serve`: the web server, fit for a network."""

import argparse
import re

from everruns_pipelines.commands.arguments import number
from everruns_pipelines.settings import Settings

HELP = "start the web server: the UI, GraphQL, the HTTP API, metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    parser.add_argument("--host", default="127.0.0.1", help="address to bind, default 127.0.0.1")
    parser.add_argument("--port", type=number, default=3000, help="port to bind, default 3000")
    parser.add_argument(
        "--path-prefix", type=_prefix, default="", help="serve everything below /x", metavar="/x"
    )
    parser.add_argument("--read-only", action="store_true", help="launch and change nothing")


def run(options: argparse.Namespace, settings: Settings) -> None:
    """Serve until a signal ends it."""
    from everruns_pipelines.serve.app import Address
    from everruns_pipelines.serve.server import serve

    address = Address(options.host, options.port, options.path_prefix)
    serve(settings, address, read_only=options.read_only)


def _prefix(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", text):
        raise argparse.ArgumentTypeError("expected a path such as /x, without a slash at its end")
    return text
