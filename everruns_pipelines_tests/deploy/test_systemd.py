"""deploy/systemd: units that systemd accepts, for the processes that the Celery tests start."""

import shutil
import subprocess

import pytest

from everruns_pipelines_tests.deployment import ROOT

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


def test_there_is_a_unit_for_every_process() -> None:
    assert [unit.stem.removeprefix("everruns-") for unit in UNITS] == [
        "code-server",
        "daemon",
        "web",
        "worker",
    ]


@pytest.mark.deploy
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_accepts_them() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, UNITS)], capture_output=True, text=True, check=False
    )
    wrong = [
        line
        for line in done.stderr.splitlines()
        # The programs lie where the deployment puts them.
        if "deploy/systemd" in line and "is not executable" not in line
    ]
    assert wrong == []
