"""Dagster's processes, each by itself as in production: they can be killed one by one."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any
from urllib import request

from everruns_pipelines.client import Deployment
from everruns_pipelines_tests.deploy.services import HOST, running
from everruns_pipelines_tests.deployment import ROOT, free_port

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

    def configure(self, dagster_yaml: str) -> None:
        """Write DAGSTER_HOME."""
        (self.home / "dagster.yaml").write_text(dagster_yaml)
        workspace = (ROOT / "deploy" / "celery" / "workspace.yaml").read_text()
        (self.home / "workspace.yaml").write_text(workspace.replace("4000", str(self.code_port)))

    def start_code_server(self) -> None:
        module = ["-m", "everruns_pipelines.definitions", "-h", HOST, "-p", str(self.code_port)]
        command = [sys.executable, "-m", "dagster", "api", "grpc", *module]
        self.start("code server", command, lambda: listens(self.code_port))

    def start_web_server(self) -> None:
        command = [str(Path(sys.executable).parent / "everruns-pipelines"), "serve"]
        self.start("web server", [*command, "--port", str(self.web_port)], self._is_ready)

    def start_daemon(self) -> None:
        command = [sys.executable, "-m", "dagster._daemon", "run", "-w", "workspace.yaml"]
        self.start("daemon", command, lambda: True)

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

    def materialize(self, day: str) -> str:
        """The facts of a day's sessions, as the UI's button does."""
        params = {
            "selector": {
                "repositoryLocationName": "everruns_pipelines",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": ["fact_session"]}],
                "assetCheckSelection": None,
            },
            "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": day}]},
            "runConfigData": {},
        }
        launched = self._ask(_MATERIALIZE, {"params": params})["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return launched["run"]["runId"]

    def terminate(self, run: str, policy: str = "SAFE_TERMINATE") -> None:
        told = self._ask(_TERMINATE, {"run": run, "policy": policy})["terminateRun"]
        assert told["__typename"] == "TerminateRunSuccess", told

    def status(self, run: str) -> str:
        return self.runs()[run]["status"]

    def retries_of(self, run: str) -> list[str]:
        return [
            other for other, told in self.runs().items() if told.get("dagster/parent_run_id") == run
        ]

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

    def _is_ready(self) -> bool:
        with suppress(OSError), request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
            return answer.status == 200
        return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
