"""Runs as Celery tasks: Dagster's launcher, with what it lacks.

Lacking are: a terminated run that ends, a killed worker that is noticed, and a process of its own
for every run. dagster.yaml names the class (see deploy/celery); its workers run `celery_worker`.
"""

import time
from collections.abc import Mapping
from typing import Any, Self

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._serdes import ConfigurableClassData
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG

from everruns_pipelines.orchestration.launch_once import is_to_be_launched

# How long to wait for workers to say what they are doing, and how long none of them may know of a
# run before it counts as lost: two looks of run monitoring.
_ANSWER_SECONDS = 2.0
_LOST_AFTER_SECONDS = 8.0
# So long after the broker came up workers may not have found it again.
_BROKER_SETTLES_SECONDS = 60

_CELERY = {
    # A worker takes what it can begin with, and leaves the rest to others.
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # A process per run, forked from one that has everything loaded: what a run leaves behind, its
    # engine and its memory, ends with it.
    "worker_max_tasks_per_child": 1,
    # It waits for a broker that restarts, however long that takes.
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # Dagster tries a run again, knowing what became of it; Celery's own second try would double it.
    "task_acks_late": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "task_track_started": True,
    "result_expires": 86_400,
    # One that waits longer than this would be handed out twice.
    "broker_transport_options": {"visibility_timeout": 86_400},
    # A run that is launched while the broker restarts waits for it.
    "task_publish_retry_policy": {
        "max_retries": 30,
        "interval_start": 0,
        "interval_step": 1,
        "interval_max": 1,
    },
}


class EverrunsCeleryRunLauncher(CeleryRunLauncher):
    """Starts runs as Celery tasks, with Redis between.

    A terminated run gets the signal that Dagster's runs expect. A run whose worker died is found by
    asking the workers: one that no worker knows of, for longer than a moment, is lost.
    """

    celery: Any  # Celery has no types

    def __init__(self, broker: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            default_queue="dagster",
            broker=broker,
            backend=broker,
            config_source=_CELERY,
            inst_data=inst_data,
        )
        self._missed_since: dict[str, float] = {}

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """What dagster.yaml may say."""
        return {"broker": dg.Field(dg.StringSource, description="redis://host:port/number")}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """The launcher that dagster.yaml describes."""
        return cls(inst_data=inst_data, **config_value)

    @property
    def supports_resume_run(self) -> bool:
        """A lost run is launched again as a whole: whatever it did is done once all the same."""
        return False

    def launch_run(self, context: LaunchRunContext) -> None:
        """Hand it to the workers, once."""
        with is_to_be_launched(self._instance, context.dagster_run.run_id) as is_first:
            if is_first:
                super().launch_run(context)

    def terminate(self, run_id: str) -> bool:
        """Interrupt the run where it is; one whose worker died is over at once."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        task = run.tags.get(DAGSTER_CELERY_TASK_ID_TAG)
        is_at_work = task is not None and self._workers_know(task)
        if task is not None:
            self.celery.control.revoke(task, terminate=True, signal="SIGTERM")
        if not is_at_work:
            self._instance.report_run_canceled(run, message="No worker is at work on it.")
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether somebody works on the run, which is not finished."""
        task = run.tags.get(DAGSTER_CELERY_TASK_ID_TAG)
        if task is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)  # not ours, such as a command line's
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            if self.celery.AsyncResult(task).ready():
                return CheckRunHealthResult(WorkerStatus.FAILED, "Its process is gone.")
            if self._workers_know(task) or self._broker_is_young():
                self._missed_since.pop(task, None)
                return CheckRunHealthResult(WorkerStatus.RUNNING)
        except (OperationalError, RedisError, OSError):
            # Whether it runs is not known: without a broker nobody can say that it does not.
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if time.monotonic() - self._missed_since.setdefault(task, time.monotonic()) < (
            _LOST_AFTER_SECONDS
        ):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        del self._missed_since[task]
        return CheckRunHealthResult(WorkerStatus.FAILED, "No worker knows of it any more.")

    def _workers_know(self, task: str) -> bool:
        workers: Any = self.celery.control.inspect(timeout=_ANSWER_SECONDS)
        answers: dict[str, Mapping[str, Any]] = workers.query_task(task) or {}
        return any(task in told for told in answers.values())

    def _broker_is_young(self) -> bool:
        server = self.celery.backend.client.info("server")
        return server["uptime_in_seconds"] < _BROKER_SETTLES_SECONDS
