"""Arguments that several commands share."""

import argparse
import socket

from everruns_pipelines.errors import FieldError, Refusal

_LARGEST_PORT = 65535


def number(text: str) -> int:
    """A whole number, or what to say instead of `invalid int value`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.60}") from None


def add_org_id(parser: argparse.ArgumentParser) -> None:
    """`--org-id`."""
    parser.add_argument("--org-id", type=number, help="one organization; all if not given")


def add_address(parser: argparse.ArgumentParser) -> None:
    """`--host` and `--port` of a server."""
    parser.add_argument("--host", default="127.0.0.1", help="address to bind, default 127.0.0.1")
    parser.add_argument("--port", type=number, default=3000, help="port to bind, default 3000")


def refuse_address(host: str, port: int) -> None:
    """Refuse what cannot be bound, before anything is started.

    Raises:
        Refusal: the port is out of range or taken, or the host is not this machine.
    """
    expected = f"a free port from 1 to {_LARGEST_PORT}"
    if 1 <= port <= _LARGEST_PORT:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.create_server((host, port), family=family):
                return
        except OSError as error:
            found = f"{host}:{port}: {error.strerror}"
    else:
        found = str(port)
    raise Refusal(
        f"port: expected {expected}, got {found}", errors=(FieldError(("port",), expected),)
    )


def add_days(parser: argparse.ArgumentParser) -> None:
    """`--days`."""
    parser.add_argument("--days", type=number, default=7, help="days to compare, default 7")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """`--dry-run`."""
    parser.add_argument("--dry-run", action="store_true", help="count only, write nothing")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """What every command that launches a job has: `--verbose`, `--url`."""
    parser.add_argument(
        "--verbose", action="store_true", help="print every count, not only those of the API"
    )
    parser.add_argument("--url", help="run it in the deployment at http://host:port, not here")
