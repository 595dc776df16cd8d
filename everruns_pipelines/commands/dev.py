"""`dev`: Dagster's UI and daemon on this machine."""

import argparse
import os
import sys

from everruns_pipelines.commands.arguments import number
from everruns_pipelines.settings import Settings

HELP = "start Dagster's UI and daemon on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dev` takes."""
    parser.add_argument("--port", type=number, default=3000, help="port on 127.0.0.1, default 3000")


def run(options: argparse.Namespace, _: Settings) -> None:
    """Take this process over: signals reach Dagster, which ends its own children."""
    command = ["-m", "dagster", "dev", "--host", "127.0.0.1", "--port", str(options.port)]
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606, no shell is wanted
