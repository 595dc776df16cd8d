"""Dagster's processes, each by itself as in production: they can be killed one by one."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any
from urllib import request

from everruns_pipelines.client import Deployment
from everruns_pipelines_tests.deploy.services import HOST, running
from everruns_pipelines_tests.deployment import ROOT, free_port

_WORKSPACE = ROOT / "deploy" / "celery" / "workspace.yaml"
_RUNS = """
query Runs { runsOrError { ... on Runs { results {
    runId status jobName tags { key value }
} } } }
"""
_TERMINATE = """
mutation Terminate($run: String!, $policy: TerminateRunPolicy) {
    terminateRun(runId: $run, terminatePolicy: $policy) { __typename }
}
"""
_MATERIALIZE = """
mutation Launch($params: ExecutionParams!) {
    launchPipelineExecution(executionParams: $params) {
        __typename
        ... on LaunchRunSuccess { run { runId } }
        ... on PythonError { message }
    }
}
"""
_BACKFILL = """
mutation Backfill($params: LaunchBackfillParams!) {
    launchPartitionBackfill(backfillParams: $params) {
        __typename
        ... on LaunchBackfillSuccess { backfillId }
        ... on PythonError { message }
    }
}
"""
_PROCESS = """
query Process($run: ID!) {
    logsForRun(runId: $run) { ... on EventConnection { events { ... on EngineEvent {
        metadataEntries {
            label ... on TextMetadataEntry { text } ... on IntMetadataEntry { intRepr }
        }
    } } } }
}
"""
_LOG = """
query Log($run: ID!) {
    logsForRun(runId: $run) { ... on EventConnection { events {
        ... on MessageEvent { message }
        ... on ExecutionStepUpForRetryEvent { error { causes { message } } }
    } } }
}
"""
_DAYS = """
query Days {
    assetNodeOrError(assetKey: {path: ["fact_session"]}) { ... on AssetNode {
        assetPartitionStatuses { ... on TimePartitionStatuses {
            ranges { startKey endKey status }
        } }
    } }
}
"""
_SENSOR = """
query Sensor($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) {
    ... on Sensor { id }
} }
"""
_STOP_SENSOR = "mutation Stop($id: String) { stopSensor(id: $id) { __typename } }"
_LIMIT_POOL = """
mutation Limit($pool: String!, $limit: Int!) {
    setConcurrencyLimit(concurrencyKey: $pool, limit: $limit)
}
"""


@dataclass
class Processes:
    """A code server, a daemon and a web server, with DAGSTER_HOME in `home`."""

    home: Path
    environment: Mapping[str, str]
    web_port: int = field(default_factory=free_port)
    code_port: int = field(default_factory=free_port)
    _stack: ExitStack = field(default_factory=ExitStack)
    _processes: dict[str, Popen[bytes]] = field(default_factory=dict[str, "Popen[bytes]"])

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.web_port}"

    def configure(self, dagster_yaml: str, workspace: Path = _WORKSPACE) -> None:
        """Write DAGSTER_HOME."""
        (self.home / "dagster.yaml").write_text(dagster_yaml)
        own = workspace.read_text().replace("4000", str(self.code_port))
        (self.home / "workspace.yaml").write_text(own)

    def start_code_server(self) -> None:
        module = ["-m", "everruns_pipelines.definitions", "-h", HOST, "-p", str(self.code_port)]
        command = [sys.executable, "-m", "dagster", "api", "grpc", *module]
        self.start("code server", command, lambda: listens(self.code_port))

    def start_web_server(self, name: str = "web server", port: int | None = None) -> None:
        """Start one, which listens; whether it can do its work, `is_ready` says."""
        port = port or self.web_port
        command = [str(Path(sys.executable).parent / "everruns-pipelines"), "serve"]
        self.start(name, [*command, "--port", str(port)], lambda: listens(port))

    def start_daemon(self, name: str = "daemon") -> None:
        command = [sys.executable, "-m", "dagster._daemon", "run", "-w", "workspace.yaml"]
        self.start(name, command, lambda: True)

    def start(self, name: str, command: list[str], is_ready: Callable[[], bool]) -> None:
        """Start a process of this deployment."""
        environment = {**self.environment, "DAGSTER_HOME": str(self.home)}
        context = running(
            command, is_ready, self.log(name), environment=environment, directory=self.home
        )
        self._processes[name] = self._stack.enter_context(context)

    def kill(self, name: str) -> None:
        """SIGKILL a process and its children."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def close(self) -> None:
        """Stop them all, the last one first."""
        self._stack.close()

    def log(self, name: str) -> Path:
        return self.home / f"{name.replace(' ', '-')}.log"

    def launch(self, *, organization: int | None = None) -> str:
        """A backfill."""
        config = {"limit": 5000, "org_id": organization}
        return Deployment(self.url).launch("backfill_reporting", {"enqueue": config})

    def materialize(self, day: str, last: str | None = None) -> str:
        """The facts of a day's sessions, or of those up to `last`, as the UI's button does."""
        tags = {"dagster/partition": day}
        if last is not None:
            tags = {
                "dagster/asset_partition_range_start": day,
                "dagster/asset_partition_range_end": last,
            }
        params = {
            "selector": {
                "repositoryLocationName": "everruns_pipelines",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": ["fact_session"]}],
                "assetCheckSelection": None,
            },
            "mode": "default",
            "executionMetadata": {
                "tags": [{"key": key, "value": value} for key, value in tags.items()]
            },
            "runConfigData": {},
        }
        launched = self._ask(_MATERIALIZE, {"params": params})["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]

    def materialize_days(self, days: Sequence[str]) -> str:
        """The facts of sessions of some days, as the UI's button does: Dagster's backfill."""
        params = {"assetSelection": [{"path": ["fact_session"]}], "partitionNames": days}
        launched = self._ask(_BACKFILL, {"params": params})["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        return launched["backfillId"]

    def days_by_status(self) -> list[dict[str, str]]:
        """What the UI shows of the days of sessions' facts."""
        return self._ask(_DAYS, {})["assetNodeOrError"]["assetPartitionStatuses"]["ranges"]

    def stop_healing(self) -> None:
        """What a test has lost is the test's to repair."""
        selector = {
            "repositoryLocationName": "everruns_pipelines",
            "repositoryName": "__repository__",
            "sensorName": "reporting_healing_sensor",
        }
        found = self._ask(_SENSOR, {"selector": selector})["sensorOrError"]
        stopped = self._ask(_STOP_SENSOR, found)["stopSensor"]
        assert stopped["__typename"] == "StopSensorMutationResult", stopped

    def limit_pool(self, pool: str, limit: int) -> None:
        self._ask(_LIMIT_POOL, {"pool": pool, "limit": limit})

    def terminate(self, run: str, policy: str = "SAFE_TERMINATE") -> None:
        told = self._ask(_TERMINATE, {"run": run, "policy": policy})["terminateRun"]
        assert told["__typename"] == "TerminateRunSuccess", told

    def status(self, run: str) -> str:
        return self.runs()[run]["status"]

    def told(self, run: str) -> str:
        """Every message of a run's log, and why it tried again."""
        events = self._ask(_LOG, {"run": run})["logsForRun"]["events"]
        causes = [
            cause["message"]
            for event in events
            if event.get("error")
            for cause in event["error"]["causes"]
        ]
        return "\n".join([*(event.get("message", "") for event in events), *causes])

    def processes_of(self, run: str) -> list[int]:
        """The numbers of the processes that told that they work on a run."""
        events = self._ask(_PROCESS, {"run": run})["logsForRun"]["events"]
        return [
            int(entry.get("text") or entry["intRepr"])
            for event in events
            for entry in event.get("metadataEntries", ())
            if entry["label"] == "pid"
        ]

    def retries_of(self, run: str) -> list[str]:
        return [
            other for other, told in self.runs().items() if told.get("dagster/parent_run_id") == run
        ]

    def runs_of_backfill(self, backfill: str) -> dict[str, dict[str, str]]:
        return {
            run: told
            for run, told in self.runs().items()
            if told.get("dagster/backfill") == backfill
        }

    def runs(self) -> dict[str, dict[str, str]]:
        """Status, job and tags of every run, by its id."""
        return {
            run["runId"]: {
                "status": run["status"],
                "job": run["jobName"],
                **{tag["key"]: tag["value"] for tag in run["tags"]},
            }
            for run in self._ask(_RUNS, {})["runsOrError"]["results"]
        }

    def _ask(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        asked = request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)["data"]


def is_ready(port: int) -> bool:
    """Whether a web server can do its work."""
    with suppress(OSError), request.urlopen(f"http://{HOST}:{port}/readyz", timeout=5) as answer:
        return answer.status == 200
    return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
