"""`diagnose`: what is missing, stale, failing or waiting, in a terminal."""

import argparse
from typing import TYPE_CHECKING, Any

from everruns_pipelines.commands.arguments import add_days
from everruns_pipelines.errors import RunFailure
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.operations.diagnosis import Diagnosis

HELP = "show what is wrong with the data, and what to do; exit status 1 if anything is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `diagnose` takes."""
    add_days(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object, not tables")


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any] | None:
    """Look, and show.

    Raises:
        RunFailure: something is wrong.
    """
    diagnosis = look(options, settings)
    found = diagnosis.as_json() if options.json else None
    if found is None:
        from everruns_pipelines.commands.tables import show_diagnosis

        show_diagnosis(diagnosis)
    if not diagnosis.is_well:
        raise RunFailure(diagnosis.verdict(), found)
    return found


def look(options: argparse.Namespace, settings: Settings) -> "Diagnosis":
    """The diagnosis of `--days`, with a line on standard error that says what is looked at."""
    from rich.console import Console

    from everruns_pipelines.operations.diagnosis import Databases, diagnose

    with Console(stderr=True).status("Looking") as status:
        return diagnose(Databases.of(settings), options.days, status.update)
