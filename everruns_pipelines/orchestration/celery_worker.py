"""What a Celery worker runs: `celery -A everruns_pipelines.orchestration.celery_worker worker`.

The broker and all else stands in the dagster.yaml of DAGSTER_HOME, as for the daemon. Everything
that a run needs is loaded here, before the worker forks a process for it.
"""

from importlib import import_module
from typing import Any

import dagster as dg
from dagster._cli.api import _execute_run_command_body  # pyright: ignore[reportPrivateUsage]
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import unpack_value
from dagster._utils.interrupts import capture_interrupts
from dagster_celery.config import TASK_EXECUTE_JOB_NAME

from everruns_pipelines.orchestration.celery_launcher import EverrunsCeleryRunLauncher


def _application() -> Any:
    import_module("everruns_pipelines.definitions")  # once, for all runs
    launcher = dg.DagsterInstance.get().run_launcher
    if not isinstance(launcher, EverrunsCeleryRunLauncher):
        raise dg.DagsterInvariantViolationError(
            "DAGSTER_HOME must hold a dagster.yaml that names EverrunsCeleryRunLauncher: "
            "see deploy/celery/dagster.yaml"
        )
    return launcher.celery


app = _application()


@app.task(name=TASK_EXECUTE_JOB_NAME)
def execute_job(execute_job_args_packed: Any) -> None:
    """Carry out one run, in this process. A signal interrupts it as Dagster's own runs."""
    args = unpack_value(execute_job_args_packed, as_type=ExecuteRunArgs)
    with capture_interrupts(), dg.DagsterInstance.get() as instance:
        _execute_run_command_body(
            args.run_id, instance, _tell_nobody, set_exit_code_on_failure=True
        )


def _tell_nobody(_event: dg.DagsterEvent) -> None:
    """What happens stands in the event log."""
