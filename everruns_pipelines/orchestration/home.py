"""Where Dagster finds its configuration: DAGSTER_HOME, else a directory under EVERRUNS_HOME."""

import os
from importlib.resources import files
from pathlib import Path

from everruns_pipelines.settings import Settings

# Shipped beside this module, so that every command works in any directory.
_SHIPPED = ("dagster.yaml", "workspace.yaml")


def dagster_home(settings: Settings) -> Path:
    """The directory that DAGSTER_HOME names, else ours, with the configuration that we ship.

    Runs' raw logs are kept there, too.
    """
    named = os.environ.get("DAGSTER_HOME")
    if named:
        return Path(named).absolute()
    home = settings.home.resolve() / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    for name in _SHIPPED:
        shipped = files("everruns_pipelines.orchestration") / name
        (home / name).write_bytes(shipped.read_bytes())
    return home
