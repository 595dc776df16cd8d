"""Dagster's run queue, which also notes where each run came from.

dagster.yaml names the class. Every run of a deployment passes here, whoever launched it.
"""

from collections.abc import Mapping
from typing import Any

from dagster import DagsterRun
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext

FROM_TAG = "everruns/from"
DRY_RUN_TAG = "everruns/dry_run"

# The tags that those who launch runs give them anyway. The UI gives none.
_TOLD_BY = {
    "dagster/sensor_name": "sensor",
    "dagster/schedule_name": "schedule",
    "everruns/token": "api",
    "everruns/request": "cli",
}


class LabellingRunCoordinator(QueuedRunCoordinator):
    """Queues runs, with the tags by which they can be told apart and found."""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        """Queue a run."""
        run = context.dagster_run
        found = labels(run.tags, run.run_config)
        if not found.items() <= run.tags.items():
            self._instance.add_run_tags(run.run_id, found)
        return super().submit_run(context)


def labels(tags: Mapping[str, str], run_config: Mapping[str, Any]) -> dict[str, str]:
    """Where a run came from, unless whoever launched it says so, and whether it writes nothing."""
    found = {FROM_TAG: tags.get(FROM_TAG) or _origin(tags)}
    ops: dict[str, Any] = run_config.get("ops", {})
    if any(op.get("config", {}).get("dry_run") for op in ops.values()):
        found[DRY_RUN_TAG] = "true"
    return found


def _origin(tags: Mapping[str, str]) -> str:
    return next((origin for tag, origin in _TOLD_BY.items() if tag in tags), "ui")
