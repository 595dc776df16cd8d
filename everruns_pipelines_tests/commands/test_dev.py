"""`dev`: what it refuses before it starts anything, as `serve` does; it starts and ends in any
directory.
"""

import json
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
from everruns_pipelines.orchestration.home import dagster_home
from everruns_pipelines.reporting.backfill import GLOBAL_LOCK
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import free_port
from everruns_pipelines_tests.reporting.world import wait_until, waiting

_IPV6 = Path("/proc/net/if_inet6")
needs_ipv6 = pytest.mark.skipif(
    not (_IPV6.exists() and _IPV6.read_text()), reason="this machine has no IPv6"
)
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


def _at_once(**_: object) -> int:
    return 0


def _start(*_: object, **__: object) -> int:
    return 0


def _not_to_be_started(*_: object, **__: object) -> int:
    pytest.fail("Dagster was started")


@pytest.mark.parametrize("command", ["dev", "serve"])
@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_out_of_range_is_refused(
    storage: Connection, command: str, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([command, "--port", port]) == 2
    assert f"port: expected a free port from 1 to 65535, got {port}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dev", "serve"])
@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        pytest.param("::1", socket.AF_INET6, marks=needs_ipv6),
    ],
)
def test_a_port_that_is_taken_is_refused(
    storage: Connection,
    command: str,
    host: str,
    family: socket.AddressFamily,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server((host, 0), family=family) as taken:
        port = str(taken.getsockname()[1])
        assert main.run([command, "--host", host, "--port", port]) == 2
    assert f"{host}:{port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dev", "serve", "project"])
def test_a_storage_of_dagster_that_is_away_is_told_without_a_trace(
    storage: Connection,
    command: str,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    away = "postgresql://me:hunter2@127.0.0.1:1/nowhere"
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", away)
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("DAGSTER_HOME", str(dagster_home(Settings.from_environment())))
    monkeypatch.setattr("dagster_postgres.utils.calculate_delay", _at_once)
    port = [] if command == "project" else ["--port", str(free_port())]
    assert main.run([command, *port]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["code"] == "unavailable"
    assert printed.err.splitlines()[-1] == (
        "everruns-pipelines: Dagster's storage cannot be used: `everruns-pipelines doctor` says why"
    )
    assert "Traceback" not in printed.err
    assert "hunter2" not in printed.err


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
