"""`dev`: what it refuses before it starts anything; it starts and ends in any directory."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib import request

import psycopg
import pytest

from everruns_pipelines.client import Deployment
from everruns_pipelines.commands import dev, main
from everruns_pipelines.databases.embedded.servers import DAGSTER_DATABASE, embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.backfill import GLOBAL_LOCK
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines_tests.deployment import free_port
from everruns_pipelines_tests.reporting.world import wait_until, waiting

_MAIN = "from everruns_pipelines.commands.main import main; main()"


@pytest.fixture
def storage(
    connection: Connection, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Connection:
    """Dagster's storage as another daemon would know it."""
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("EVERRUNS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setattr(dev, "_run_dagster", _not_to_be_started)
    return connection


def _start(*_: object, **__: object) -> int:
    return 0


def _not_to_be_started(*_: object, **__: object) -> int:
    pytest.fail("Dagster was started")


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_out_of_range_is_refused(
    storage: Connection, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["dev", "--port", port]) == 2
    assert f"port: expected a free port from 1 to 65535, got {port}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(
    storage: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main.run(["dev", "--port", port]) == 2
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_a_second_dev_on_the_same_storage_is_refused(
    storage: Connection, postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as first:
        first.execute("SELECT pg_advisory_lock(%s)", [0x6576_7270_6461_656D])
        assert main.run(["dev", "--port", str(free_port())]) == 2
    assert "Another daemon works on the same storage" in capsys.readouterr().err


def test_a_daemon_of_another_kind_is_found_by_its_heartbeat(
    storage: Connection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.execute("CREATE TABLE daemon_heartbeats (timestamp timestamp)")
    beat = "INSERT INTO daemon_heartbeats VALUES (now() AT TIME ZONE 'UTC')"
    storage.execute(beat)
    monkeypatch.setattr(dev, "_pause", lambda: storage.execute(beat))

    assert main.run(["dev", "--port", str(free_port())]) == 2

    assert "Another daemon works on the same storage" in capsys.readouterr().err


def test_a_daemon_that_is_gone_keeps_nobody_off(
    storage: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.execute("CREATE TABLE daemon_heartbeats (timestamp timestamp)")
    storage.execute("INSERT INTO daemon_heartbeats VALUES (now() AT TIME ZONE 'UTC')")
    age = "UPDATE daemon_heartbeats SET timestamp = timestamp - interval '1 min'"
    monkeypatch.setattr(dev, "_pause", lambda: storage.execute(age))
    monkeypatch.setattr(dev, "_run_dagster", _start)

    assert main.run(["dev", "--port", str(free_port())]) == 0


@pytest.mark.deploy
@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_started_in_the_background_in_any_directory_it_ends_when_told_to_and_its_runs_with_it(
    tmp_path: Path, told: signal.Signals
) -> None:
    home = tmp_path / "home"
    port = str(free_port())
    environment = {
        **{name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"},
        "EVERRUNS_HOME": str(home),
    }
    with (
        psycopg.connect(embedded_postgres_url(home), autocommit=True) as platform,
        subprocess.Popen(
            [sys.executable, "-c", _MAIN, "dev", "--port", port],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does
        ) as process,
    ):
        prepare(platform)
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                with request.urlopen(f"{url}/server_info", timeout=5):
                    return True
            except OSError:
                assert process.poll() is None
                return False

        wait_until(answers, "the UI to answer", 120)
        platform.execute("SELECT pg_advisory_lock(%s)", [GLOBAL_LOCK])
        run = Deployment(url).launch("backfill_reporting", {"enqueue": {"limit": 10}})
        wait_until(lambda: waiting(platform), "the run to wait for the lock", 60)
        process.send_signal(told)
        _, errors = process.communicate(timeout=60)
        assert not waiting(platform)
    assert process.returncode == 0
    assert "temporary" not in errors
    assert "Traceback" not in errors
    assert (home / "dagster" / "dagster.yaml").exists()
    with psycopg.connect(embedded_postgres_url(home, DAGSTER_DATABASE)) as storage:
        ended = storage.execute("SELECT status FROM runs WHERE run_id = %s", [run]).fetchone()
    assert ended in {("CANCELED",), ("FAILURE",)}
