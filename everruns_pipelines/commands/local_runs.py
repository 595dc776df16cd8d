"""Runs a job in this process, recorded where Dagster's own commands would record it."""

import logging
from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._cli.utils import get_possibly_temporary_instance_for_cli

from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.errors import Refusal, RunFailure
from everruns_pipelines.orchestration.coordinator import FROM_TAG, labels
from everruns_pipelines.orchestration.launcher import PROCESSES_TAG, processes_here
from everruns_pipelines.settings import Settings


def run_job(
    settings: Settings,
    job: str,
    ops: Mapping[str, Mapping[str, Any]],
    *,
    log_level: str = "INFO",
    origin: str = "cli",
    tags: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run `job` with the given config per op; what each op answered.

    Args:
        log_level: the least that is logged to standard error. INFO is what the ops say.
        origin: where the run comes from, for its tags.
        tags: more of them, such as those of a range of days.

    Raises:
        Refusal: the request was refused.
        RunFailure: the run failed.
    """
    run_config = {
        "ops": {name: {"config": dict(config)} for name, config in ops.items()},
        "loggers": {"console": {"config": {"log_level": log_level}}},
    }
    quiet = logging.getLogger("everruns_pipelines.instance")
    quiet.setLevel(logging.WARNING)
    with get_possibly_temporary_instance_for_cli("everruns-pipelines", logger=quiet) as instance:
        try:
            result = (
                build_definitions(settings)
                .resolve_job_def(job)
                .execute_in_process(
                    run_config=run_config,
                    tags={**_tags(origin, run_config), **(tags or {})},
                    instance=instance,
                    raise_on_error=False,
                )
            )
        except dg.DagsterError as error:
            raise RunFailure(str(error)) from error
    if not result.success:
        raise _why_failed(result)
    # What an op counted and listed beside its answer stands in the metadata, as over GraphQL.
    counts: dict[str, dict[str, Any]] = {}
    for event in result.filter_events(lambda event: event.is_successful_output):
        if event.step_key is not None:
            counted = counts.setdefault(event.step_key, {})
            for name, value in event.step_output_data.metadata.items():
                if isinstance(value, dg.IntMetadataValue):
                    counted[name] = value.value
                elif isinstance(value, dg.TableMetadataValue):
                    counted[name] = [dict(record.data) for record in value.records]
    return counts


def _tags(origin: str, run_config: Mapping[str, Any]) -> dict[str, str]:
    """What the queue and the launcher of a deployment would give the run."""
    here = processes_here()
    processes = {} if here is None else {PROCESSES_TAG: here}
    return labels({FROM_TAG: origin}, run_config) | processes


def _why_failed(result: dg.ExecuteInProcessResult) -> Refusal | RunFailure:
    """What `failures.told_plainly` said of the op that failed, however often it was tried."""
    for event in result.filter_events(lambda event: event.is_step_failure):
        failure = event.step_failure_data
        told = failure.user_failure_data
        if told is None:
            return RunFailure(failure.error_display_string.strip().splitlines()[0])
        error = told.metadata.get("error")
        if isinstance(error, dg.JsonMetadataValue) and isinstance(error.data, dict):
            return Refusal.from_error(error.data)
        return RunFailure(told.description or "the run failed")
    return RunFailure("the run failed")
