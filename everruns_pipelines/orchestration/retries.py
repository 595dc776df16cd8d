"""Whether Dagster launches a failed run again."""

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.storage.tags import WILL_RETRY_TAG


def may_be_retried(instance: DagsterInstance, run: DagsterRun) -> bool:
    """Whether a run that has ended is launched again, or that is not decided yet.

    Dagster stores that a run has failed first, and a moment later, in a tag, what follows from it.
    """
    undecided = "true" if instance.run_retries_enabled else "false"
    return (
        run.status is DagsterRunStatus.FAILURE and run.tags.get(WILL_RETRY_TAG, undecided) == "true"
    )
