"""A run learns that the code server which launched it has been replaced."""

import json
import subprocess
import sys
from pathlib import Path
from threading import Event

import dagster as dg
import pytest
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.client import DagsterGrpcClient

from everruns_pipelines.orchestration.code_server import told_when_replaced
from everruns_pipelines_tests.deployment import free_port, until


@pytest.mark.deploy
def test_a_run_is_told_when_its_code_server_is_replaced(tmp_path: Path) -> None:
    port = free_port()
    code = tmp_path / "location.py"
    code.write_text("import dagster as dg; defs = dg.Definitions()")
    command = [sys.executable, "-m", "dagster", "api", "grpc", "-f", str(code), "-p", str(port)]
    client = DagsterGrpcClient(host="localhost", port=port)
    run = dg.DagsterRun(
        "job", tags={GRPC_INFO_TAG: json.dumps({"host": "localhost", "port": port})}
    )
    replaced = Event()

    def answers() -> bool:
        try:
            client.ping("")
        except DagsterUserCodeUnreachableError:
            return False
        return True

    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        until(answers, "the code server answers")
        with told_when_replaced(run, replaced):
            assert not replaced.wait(1.5)
            first.terminate()
            first.wait(30)
            assert replaced.wait(30)


def test_a_run_without_a_code_server_is_told_nothing() -> None:
    replaced = Event()
    with told_when_replaced(dg.DagsterRun("job"), replaced):
        assert not replaced.is_set()
