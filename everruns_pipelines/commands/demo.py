"""`demo`: the main job before the reader's eyes. What it shows stands in `demonstration`."""

import argparse

from everruns_pipelines.settings import Settings

HELP = "show the main job on embedded databases, with sample data"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Nothing: the demo is always the same."""


def run(_: argparse.Namespace, settings: Settings) -> None:
    """Show it."""
    from everruns_pipelines.commands.demonstration import demonstrate

    demonstrate(settings)
