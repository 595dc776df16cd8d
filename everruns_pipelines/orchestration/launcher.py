"""Dagster's default run launcher, which can also tell that the process of a run has died.

dagster.yaml names the class. Without it, a run that dies with its machine, or while Dagster's
storage is away, counts as started for a day, and keeps its place in the queue.
"""

import json
import os
import time
from pathlib import Path

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DefaultRunLauncher
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

from everruns_pipelines.orchestration.launch_once import is_to_be_launched

# On runs: among which processes theirs is one. Another machine, another boot of this one or another
# container has others under the same numbers.
PROCESSES_TAG = "everruns/processes"

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# Between the start of a process, which the kernel counts in ticks, and the time of its first event.
_SLACK_SECONDS = 2


class LocalRunLauncher(DefaultRunLauncher):
    """Launches runs as processes of the code server, and looks after them."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Run monitoring asks for every started run."""
        return True

    def launch_run(self, context: LaunchRunContext) -> None:
        """Launch it, and note where its process is if it is beside this one."""
        run_id = context.dagster_run.run_id
        with is_to_be_launched(self._instance, run_id) as is_first:
            if not is_first:
                return
            super().launch_run(context)
        run = self._instance.get_run_by_id(run_id)
        here = processes_here()
        if run is not None and here is not None and _is_beside_us(run):
            self._instance.add_run_tags(run_id, {PROCESSES_TAG: here})

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Is the process of a started run alive? What cannot be known counts as alive."""
        noted = run.tags.get(PROCESSES_TAG)
        if noted is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if noted != processes_here():
            if GRPC_INFO_TAG in run.tags:
                # It was launched beside the daemon, and this is the daemon.
                return CheckRunHealthResult(
                    WorkerStatus.NOT_FOUND, "its machine or container has been started again"
                )
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        started = _started_process(self._instance, run.run_id)
        if started is None or is_alive(*started):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"its process {started[0]} has died")


def processes_here() -> str | None:
    """Names the processes that this one can see, as no other machine, boot or container does.

    None where it cannot be told: that takes Linux.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def is_alive(pid: int, seen: float) -> bool:
    """Is there still the process that had this number at that time?

    Args:
        seen: seconds since the epoch.
    """
    try:
        # Behind the name, which may hold anything: the state, and in 20th place the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return False
    age = uptime - int(fields[19]) / _CLOCK_TICKS
    return fields[0] != "Z" and time.time() - age <= seen + _SLACK_SECONDS


def _is_beside_us(run: DagsterRun) -> bool:
    """Only a server of this machine has a socket in the file system."""
    return "socket" in json.loads(run.tags.get(GRPC_INFO_TAG, "{}"))


def _started_process(instance: DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """The process that told first that it works on the run, and when it did."""
    events = instance.get_records_for_run(
        run_id, of_type=DagsterEventType.ENGINE_EVENT, limit=20
    ).records
    for record in events:
        event = record.event_log_entry.dagster_event
        pid = event and event.engine_event_data.metadata.get("pid")
        if pid:
            return int(str(pid.value)), record.timestamp
    return None
