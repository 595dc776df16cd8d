"""`check`: whether anything is wrong, for scripts."""

import argparse
from typing import Any

from everruns_pipelines.commands.arguments import add_days
from everruns_pipelines.errors import RunFailure
from everruns_pipelines.settings import Settings

HELP = "look whether anything is wrong, and repair nothing; exit status 1 if anything is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `check` takes."""
    add_days(parser)


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Look; what is wrong.

    Raises:
        RunFailure: something is.
    """
    from everruns_pipelines.commands.diagnose import look

    diagnosis = look(options, settings)
    found = diagnosis.summary()
    if not found["ok"]:
        raise RunFailure(diagnosis.verdict(), found)
    return found
