"""The embedded PostgreSQL: shared by processes, stopped with the last of them, data kept."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.errors import SettingsError
from everruns_pipelines_tests.reporting.world import wait_until

Start = Callable[[], "User"]

_USER = """
import sys
from pathlib import Path
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url

print(embedded_postgres_url(Path(sys.argv[1])), flush=True)
sys.stdin.readline()
"""


class User:
    """A process that uses the server until it is told to go."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _USER, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def url(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        self.process.communicate("\n", timeout=30)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "made" / "on_demand"


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Starts a process that uses the server; when all have gone, the server has, too."""
    started: list[User] = []

    def start() -> User:
        started.append(User(home))
        return started[-1]

    yield start
    for user in started:
        user.process.kill()
        user.process.communicate()
    wait_until_stopped(home)


def is_running(home: Path) -> bool:
    return (home / "postgres" / "postmaster.pid").exists()


def wait_until_stopped(home: Path) -> None:
    wait_until(lambda: not is_running(home), "the server to stop")


def ask(url: str, query: LiteralString) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def test_one_server_is_shared_by_processes_and_stops_when_the_last_one_goes(
    home: Path, start: Start
) -> None:
    first, second = start(), start()
    url = first.url()
    assert second.url() == url
    began = ask(url, "SELECT pg_postmaster_start_time()")

    first.go()

    assert ask(url, "SELECT pg_postmaster_start_time()") == began
    second.go()
    wait_until_stopped(home)


def test_the_server_stops_when_its_last_user_is_killed(home: Path, start: Start) -> None:
    user = start()
    url = user.url()
    assert is_running(home)
    assert ask(url, "SELECT 1") == 1

    user.process.send_signal(signal.SIGKILL)

    wait_until_stopped(home)


def test_the_server_starts_again_on_demand_and_has_kept_the_data(home: Path, start: Start) -> None:
    user = start()
    with psycopg.connect(user.url()) as connection:
        connection.execute(
            "INSERT INTO organizations (public_id, name) VALUES ('org_' || repeat('0', 32), 'kept')"
        )
    user.go()
    wait_until_stopped(home)

    found = ask(start().url(), "SELECT name FROM organizations ORDER BY org_id DESC LIMIT 1")

    assert found == "kept"


def test_a_process_that_comes_while_the_server_stops_gets_a_server_that_runs(
    start: Start,
) -> None:
    leaving = start()
    leaving.url()
    leaving.process.kill()

    assert ask(start().url(), "SELECT 1") == 1


def test_after_a_crash_of_the_server_the_next_process_recovers_it(home: Path, start: Start) -> None:
    url = start().url()
    postmaster = int((home / "postgres" / "postmaster.pid").read_text().splitlines()[0])
    wait_until(lambda: ask(url, "SELECT 1") == 1, "the server to answer")
    os.kill(postmaster, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{postmaster}").exists(), "the server to be gone")

    assert ask(start().url(), "SELECT count(*) >= 0 FROM events") is True


def test_a_server_that_is_killed_under_its_users_comes_back_by_itself(
    home: Path, start: Start
) -> None:
    url = start().url()
    assert ask(url, "SELECT 1") == 1
    os.kill(int((home / "postgres" / "postmaster.pid").read_text().splitlines()[0]), signal.SIGKILL)

    def is_back() -> bool:
        try:
            return ask(url, "SELECT now() - pg_postmaster_start_time() < interval '9 s'")
        except psycopg.OperationalError:
            return False

    wait_until(is_back, "the server to be back")


def test_the_platforms_tables_and_dagsters_database_are_there_from_the_start(start: Start) -> None:
    url = start().url()

    assert ask(url, "SELECT to_regclass('public.events') IS NOT NULL")
    assert ask(url, "SELECT count(*) FROM pg_database WHERE datname = 'dagster'") == 1
    assert ask(url, "SHOW timezone") == "UTC"


def test_a_path_with_spaces_is_refused_with_the_variable_to_set(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^EVERRUNS_HOME: expected a path without spaces"):
        embedded_postgres_url(tmp_path / "my projects")

    assert list(tmp_path.iterdir()) == []
