"""Runs the application: one process, until a signal ends it."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn
from dagster import DagsterInstance
from dagster._cli.utils import get_possibly_temporary_instance_for_cli
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import (
    ModuleTarget,
    WorkspaceFileTarget,
    WorkspaceLoadTarget,
)
from dagster._utils.interrupts import setup_interrupt_handlers
from dagster_postgres import PostgresRunStorage

from everruns_pipelines import __version__
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.home import dagster_home
from everruns_pipelines.serve.app import Address, create_app
from everruns_pipelines.settings import Settings

# As Dagster's own web server has them by default.
_STATEMENT_MILLISECONDS, _RECYCLE_SECONDS, _MOST_CONNECTIONS = 15_000, 3600, 20
# How long requests that wait for their runs may go on after a signal.
_GRACE_SECONDS = 5


def serve(settings: Settings, address: Address, *, read_only: bool) -> None:
    """Serve until a signal ends it.

    Raises:
        Refusal: Dagster's storage cannot be reached, or is none that several servers can share.
        SettingsError: the file of the tokens cannot be read.
    """
    home = _find_home(settings)
    with get_possibly_temporary_instance_for_cli("everruns-pipelines serve") as instance:
        _check(instance)
        logger = _told_on_standard_error()
        instance.optimize_for_webserver(
            _STATEMENT_MILLISECONDS, _RECYCLE_SECONDS, _MOST_CONNECTIONS
        )
        with WorkspaceProcessContext(
            instance,
            workspace_load_target=_workspace(home),
            version=__version__,
            read_only=read_only,
        ) as context:
            app = create_app(context, settings, address, read_only=read_only)
            logger.info("Serving on http://%s:%d%s", address.host, address.port, address.prefix)
            # Whoever ended the server ends the code server too, on the way out.
            setup_interrupt_handlers()
            with suppress(KeyboardInterrupt):
                uvicorn.run(
                    app,
                    host=address.host,
                    port=address.port,
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    proxy_headers=False,
                    ws_max_size=2**20,
                    timeout_graceful_shutdown=_GRACE_SECONDS,
                )


def _check(instance: DagsterInstance) -> None:
    if not isinstance(instance.run_storage, PostgresRunStorage):
        raise Refusal(
            "Dagster's storage must be PostgreSQL: take over `storage` from the project's"
            " dagster.yaml into the one in this directory, or in DAGSTER_HOME",
            code="unavailable",
            status=503,
        )


def _find_home(settings: Settings) -> Path:
    """Where Dagster's configuration is: this directory if it holds one, else where `dev` has it."""
    if not os.environ.get("DAGSTER_HOME") and Path("dagster.yaml").exists():
        return Path()
    home = dagster_home(settings)
    os.environ["DAGSTER_HOME"] = str(home)
    return home


def _workspace(home: Path) -> WorkspaceLoadTarget:
    """The code location that this directory's workspace.yaml names, else the one of `home`."""
    for directory in (Path(), home):
        if (directory / "workspace.yaml").exists():
            return WorkspaceFileTarget([str(directory / "workspace.yaml")])
    return ModuleTarget(
        module_name="everruns_pipelines.definitions",
        attribute=None,
        working_directory=None,
        location_name="everruns_pipelines",
    )


def _told_on_standard_error() -> logging.Logger:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("everruns_pipelines")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return logger
