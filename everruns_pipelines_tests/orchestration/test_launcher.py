"""Run monitoring finds runs whose process has died, with the repository's own dagster.yaml."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger
from typing import Any, cast

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.events import EngineEventData
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._daemon.monitoring.run_monitoring import monitor_started_run

from everruns_pipelines.orchestration.launch_once import is_to_be_launched
from everruns_pipelines.orchestration.launcher import PROCESSES_TAG, is_alive, processes_here
from everruns_pipelines_tests.deployment import ROOT


@pytest.fixture
def deployed(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", postgres_url)
    with DagsterInstance.from_config(str(ROOT)) as instance:
        yield instance


def seen(instance: DagsterInstance, run: DagsterRun) -> DagsterRunStatus:
    """The state of a run once monitoring has looked at it."""
    record = instance.get_run_record_by_id(run.run_id)
    assert record is not None
    monitor_started_run(instance, cast("Any", None), record, getLogger())
    looked_at = instance.get_run_by_id(run.run_id)
    assert looked_at is not None
    return looked_at.status


def started(instance: DagsterInstance, pid: int, processes: str | None) -> DagsterRun:
    tags = {GRPC_INFO_TAG: '{"host": "localhost", "socket": "/nowhere"}'}
    if processes is not None:
        tags[PROCESSES_TAG] = processes
    run = instance.add_run(DagsterRun("idle", status=DagsterRunStatus.STARTED, tags=tags))
    told = f"Started process for run (pid: {pid})."
    instance.report_engine_event(told, run, EngineEventData.in_process(pid))
    return run


def test_a_run_is_failed_once_its_process_has_been_killed(deployed: DagsterInstance) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run = started(deployed, process.pid, processes_here())
        assert seen(deployed, run) == DagsterRunStatus.STARTED
        process.kill()
        process.wait()
    assert seen(deployed, run) == DagsterRunStatus.FAILURE


def test_a_run_of_before_the_last_boot_is_failed_though_its_number_lives(
    deployed: DagsterInstance,
) -> None:
    run = started(deployed, os.getpid(), "another boot")
    assert seen(deployed, run) == DagsterRunStatus.FAILURE


def test_a_run_of_which_nothing_is_known_is_left_alone(deployed: DagsterInstance) -> None:
    run = started(deployed, 2**22 - 1, None)
    assert seen(deployed, run) == DagsterRunStatus.STARTED


def test_another_process_of_the_same_number_is_not_the_one() -> None:
    assert is_alive(os.getpid(), time.time())
    assert not is_alive(os.getpid(), time.time() - 86400 * 365)


def test_a_run_is_launched_once_by_two_daemons(deployed: DagsterInstance) -> None:
    runs = [deployed.add_run(DagsterRun("idle")).run_id for _ in range(5)]
    launched: list[str] = []

    def launch(run_id: str) -> None:
        with is_to_be_launched(deployed, run_id) as is_first:
            if is_first:
                launched.append(run_id)

    with ThreadPoolExecutor(4) as daemons:
        list(daemons.map(launch, runs * 4))
    assert sorted(launched) == sorted(runs)


def test_a_launch_that_failed_is_tried_again_and_a_retry_of_the_run_is_another_run(
    deployed: DagsterInstance,
) -> None:
    run = deployed.add_run(DagsterRun("idle"))

    def fail() -> None:
        with is_to_be_launched(deployed, run.run_id) as is_first:
            assert is_first
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    for expected in (True, False):
        with is_to_be_launched(deployed, run.run_id) as is_first:
            assert is_first is expected
    launched = deployed.get_run_by_id(run.run_id)
    assert launched is not None
    retry = deployed.add_run(DagsterRun("idle", tags=launched.tags))
    with is_to_be_launched(deployed, retry.run_id) as is_first:
        assert is_first
