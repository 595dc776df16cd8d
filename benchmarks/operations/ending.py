"""How fast a run that lingers ends on a real deployment, once somebody terminates it."""

import json
import time
from collections.abc import Callable, Generator
from urllib import request

from dagster import DagsterInstance, DagsterRunStatus

from benchmarks.operations._platform import sample, storage_of
from benchmarks.operations._table import Row, show
from everruns_pipelines.client import Deployment
from everruns_pipelines_tests.deployment import LiveDeployment, live_deployment, until

_LINGERS = {"project": {"linger_seconds": 600}}
_TERMINATE = 'mutation {{ terminateRun(runId: "{run}") {{ __typename }} }}'


def main() -> None:
    """Measure, and print beside the target."""
    show("A run that lingers ends", ending())


def ending() -> Generator[Row]:
    with sample(events=400) as (settings, home), storage_of(settings) as (instance, _):
        environment = {"EVERRUNS_HOME": str(settings.home)}
        with live_deployment(home, environment) as live:
            terminated = _seconds(
                live, instance, lambda run: _ask(live, _TERMINATE.format(run=run))
            )
    yield "terminated", f"{terminated:.1f} s", "< 1 s"


def _seconds(
    live: LiveDeployment, instance: DagsterInstance, end: Callable[[str], object]
) -> float:
    """From telling a run that is at work to end until it has ended."""
    run = Deployment(live.url).launch("project_reporting", _LINGERS)

    def status() -> DagsterRunStatus:
        found = instance.get_run_by_id(run)
        assert found is not None
        return found.status

    until(lambda: status() == DagsterRunStatus.STARTED, "the run is at work")
    time.sleep(5)  # it has drained what was due, and looks every second
    told = time.time()
    end(run)
    until(lambda: status().value in ("SUCCESS", "CANCELED"), "the run has ended")
    record = instance.get_run_record_by_id(run)
    assert record is not None
    assert record.end_time is not None
    return record.end_time - told


def _ask(live: LiveDeployment, query: str) -> None:
    body = json.dumps({"query": query}).encode()
    asked = request.Request(f"{live.url}/graphql", body, {"Content-Type": "application/json"})
    with request.urlopen(asked, timeout=60) as answer:
        assert "errors" not in json.load(answer)
