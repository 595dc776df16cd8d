"""`doctor`: whether everything is in place."""

import argparse

from everruns_pipelines.errors import RunFailure
from everruns_pipelines.settings import Settings

HELP = "check that everything is in place, and say what to do; exit status 1 if it is not"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Nothing: what `doctor` looks at is what the environment says."""


def run(_: argparse.Namespace, settings: Settings) -> None:
    """Ask every question, and show the answers.

    Raises:
        RunFailure: something is to be done.
    """
    from everruns_pipelines.commands.tables import show_findings
    from everruns_pipelines.operations.doctor import examine

    if not show_findings(examine(settings)):
        raise RunFailure("something is to be done")
