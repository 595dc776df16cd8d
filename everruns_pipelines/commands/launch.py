"""Runs the job that a command stands for: in this process, or in a running deployment."""

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.databases.postgres import Connection


def refuse_early(
    options: argparse.Namespace, settings: Settings, check: "Callable[[Connection | None], None]"
) -> None:
    """Refuse before a run is made: for what the request says, else for what the database holds.

    A deployment's database need not be within reach: its run will refuse.
    """
    check(None)
    if options.url is not None:
        return
    from everruns_pipelines.databases.postgres import PostgresDatabase
    from everruns_pipelines.reporting.database import check_platform, prepare

    with PostgresDatabase(settings).connect() as connection:
        check_platform(connection)
        check(connection)
        prepare(connection)


def run_job(
    options: argparse.Namespace,
    settings: Settings,
    job: str,
    ops: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Run a job to its end; what each op answered.

    Raises:
        Refusal: the request was refused.
        RunFailure: the run failed.
    """
    if options.url is not None:
        from everruns_pipelines.client import Deployment
        from everruns_pipelines.commands.progress import shown

        with shown(job) as tell:
            return Deployment(options.url, settings.headers()).run(job, ops, tell)
    from everruns_pipelines.commands import local_runs

    return local_runs.run_job(settings, job, ops)
