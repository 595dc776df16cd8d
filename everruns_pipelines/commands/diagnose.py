"""`diagnose`: what is missing, stale, failing or waiting, in a terminal."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import number
from everruns_pipelines.settings import Settings

HELP = "show what is missing, stale, failing or waiting"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `diagnose` takes."""
    parser.add_argument("--days", type=number, default=7, help="days to compare, default 7")
    parser.add_argument("--json", action="store_true", help="one JSON object, not tables")


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any] | None:
    """Look, and show."""
    from rich.console import Console

    from everruns_pipelines.operations.diagnosis import Databases, diagnose

    with Console(stderr=True).status("Looking") as status:
        diagnosis = diagnose(Databases.of(settings), options.days, status.update)
    if options.json:
        return diagnosis.as_json()
    from everruns_pipelines.commands.tables import show_diagnosis

    show_diagnosis(diagnosis)
    return None
