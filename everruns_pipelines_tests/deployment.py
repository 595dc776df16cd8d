"""A webserver and a daemon on this machine, for the tests that need a deployment."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copy
from typing import Any
from urllib import request

from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus

ROOT = Path(__file__).parents[1]
_HEALING_SENSORS = ("reporting_healing_sensor", "item_failures_sensor")
_NAMED = """
    sensorSelector: {
      repositoryLocationName: "everruns_pipelines"
      repositoryName: "__repository__"
      sensorName: $name
    }
"""
_SENSOR = f"query($name: String!) {{ sensorOrError({_NAMED}) {{ ... on Sensor {{ id }} }} }}"
_START_SENSOR = f"mutation($name: String!) {{ startSensor({_NAMED}) {{ __typename }} }}"
_TICKS = f"""query($name: String!) {{ sensorOrError({_NAMED}) {{
  ... on Sensor {{ sensorState {{ ticks(limit: 20) {{ skipReason }} }} }}
}} }}"""


@dataclass
class LiveDeployment:
    """Dagster with the repository's own dagster.yaml and workspace.yaml."""

    home: Path
    environment: Mapping[str, str]
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(
        default_factory=dict[str, subprocess.Popen[bytes]]
    )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_daemon(self) -> None:
        workspace = str(ROOT / "workspace.yaml")
        self._start("daemon", sys.executable, "-m", "dagster._daemon", "run", "-w", workspace)

    def start_webserver(self) -> None:
        command = Path(sys.executable).with_name("everruns-pipelines")
        self._start("webserver", str(command), "serve", "--port", str(self.port))

    def wait_for_webserver(self) -> None:
        until(self._answers, "the webserver answers")

    def stop_healing(self) -> None:
        """What a test has lost is the test's to repair."""
        stop = "mutation($id: String) { stopSensor(id: $id) { __typename } }"
        for name in _HEALING_SENSORS:
            found = self._ask(_SENSOR, {"name": name})["sensorOrError"]
            stopped = self._ask(stop, found)["stopSensor"]
            assert stopped["__typename"] == "StopSensorMutationResult"

    def start_healing(self) -> None:
        """As a deployment does by itself."""
        for name in _HEALING_SENSORS:
            started = self._ask(_START_SENSOR, {"name": name})["startSensor"]
            assert started["__typename"] == "Sensor"

    def has_found_all_right(self) -> bool:
        """Whether a look at all history has found nothing missing or stale."""
        looks = {"name": "reporting_healing_sensor"}
        ticks = self._ask(_TICKS, looks)["sensorOrError"]["sensorState"]["ticks"]
        return any("Nothing is missing" in (tick["skipReason"] or "") for tick in ticks)

    def stop(self, name: str) -> None:
        """End a process with all that it has started: a code server waits for its runs."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def _start(self, name: str, *command: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self.environment, "DAGSTER_HOME": str(self.home)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _ask(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables or {}}).encode()
        headers = {"Content-Type": "application/json"}
        asked = request.Request(f"{self.url}/graphql", body, headers)
        with request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)["data"]

    def _answers(self) -> bool:
        try:
            with request.urlopen(f"{self.url}/server_info", timeout=5):
                return True
        except OSError:
            return False


@contextmanager
def live_deployment(home: Path, environment: Mapping[str, str]) -> Generator[LiveDeployment]:
    """A deployment that runs for as long as the context, with its own DAGSTER_HOME in `home`."""
    copy(ROOT / "dagster.yaml", home)
    deployment = LiveDeployment(home, environment, free_port())
    try:
        deployment.start_webserver()
        deployment.wait_for_webserver()
        deployment.stop_healing()
        deployment.start_daemon()
        yield deployment
    finally:
        for name in tuple(deployment.processes):
            deployment.stop(name)


def run_commands(page: str, live: LiveDeployment, directory: Path) -> str:
    """Run every command on a page of the documentation; what they print."""
    document = (ROOT / "docs" / page).read_text()
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", document, re.DOTALL | re.MULTILINE))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env={
            **os.environ,
            **live.environment,
            "URL": live.url,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed_a_moment_ago(instance: DagsterInstance, job: str) -> DagsterRun:
    """A run of which Dagster has stored that it failed, and not yet whether it is tried again."""
    run = instance.add_run(DagsterRun(job, status=DagsterRunStatus.STARTED))
    failed = DagsterEvent(DagsterEventType.RUN_FAILURE.value, job, message="it died")
    instance.run_storage.handle_run_event(run.run_id, failed)
    return run


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for a condition, and fail if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
