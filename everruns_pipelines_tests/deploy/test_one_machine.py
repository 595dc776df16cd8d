"""The project's own dagster.yaml, every process real: how many connections it takes, what happens
when there are no more of them, and what else may die.
"""

import os
import re
import signal
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import ensure_platform_schema
from everruns_pipelines_tests.deploy.deployments import held_run, one_machine
from everruns_pipelines_tests.deploy.platform import Platform, counted
from everruns_pipelines_tests.deploy.processes import Processes, is_ready
from everruns_pipelines_tests.deploy.services import PostgresServer
from everruns_pipelines_tests.deployment import ROOT, free_port, until

pytestmark = pytest.mark.deploy

WORKER = "worker"
RUNS, WEB_SERVERS = 8, 2


class Server:
    """PostgreSQL with the platform and Dagster's storage, for a role that is no superuser."""

    def __init__(self, data: Path) -> None:
        self.postgres = PostgresServer(data)
        self.postgres.initialize()
        self._running = ExitStack()

    def start(self) -> None:
        self._running.enter_context(self.postgres.started())

    def stop(self) -> None:
        self._running.close()

    def connect(self, database: str) -> psycopg.Connection:
        url = self.postgres.url(database)
        return psycopg.connect(url, autocommit=True, application_name="a test")

    @contextmanager
    def limited(self, database: str, connections: int) -> Generator[None]:
        """So many connections at once and no more; those that are there are ended."""
        limit = sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}")
        named = sql.Identifier(database)
        with self.connect("postgres") as admin:
            admin.execute(limit.format(named, sql.Literal(connections)))
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND usename = %s",
                [database, WORKER],
            )
            yield
            admin.execute(limit.format(named, sql.Literal(-1)))


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    server = Server(place / "data")
    server.start()
    worker = sql.Identifier(WORKER)
    with server.connect("postgres") as admin:
        for statement in (
            "CREATE ROLE {} LOGIN",
            "CREATE DATABASE platform OWNER {}",
            "CREATE DATABASE dagster OWNER {}",
        ):
            admin.execute(sql.SQL(statement).format(worker))
    with server.connect("platform") as connection:
        ensure_platform_schema(connection)
        load_sample_data(connection, events=600, days=4, enqueued_share=0)
        connection.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(worker))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def environment(server: Server, place: Path) -> dict[str, str]:
    return {
        "EVERRUNS_POSTGRES_URL": server.postgres.url("platform", WORKER),
        "EVERRUNS_DAGSTER_POSTGRES_URL": server.postgres.url("dagster", WORKER),
        "EVERRUNS_HOME": str(place / "home"),
        "EVERRUNS_PARTS": "reporting",
        "EVERRUNS_LINGER_SECONDS": "0",
    }


@pytest.fixture
def lived(server: Server, environment: dict[str, str]) -> Iterator[Platform]:
    with server.connect("platform") as connection:
        yield Platform(connection, environment)


@pytest.fixture(scope="module")
def deployment(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    with one_machine(tmp_path_factory.mktemp("plain"), environment, runs=RUNS) as deployment:
        deployment.start_web_server("second web server", free_port())
        yield deployment


def said(database: str) -> int:
    """How many connections docs/operating.md says that this deployment takes."""
    text = (ROOT / "docs" / "operating.md").read_text()
    found = re.search(
        rf"\| {database} \| `(\d+) [*] runs \+ (\d+) [*] web servers \+ (\d+)` \|", text
    )
    assert found is not None
    per_run, per_web_server, rest = map(int, found.groups())
    return per_run * RUNS + per_web_server * WEB_SERVERS + rest


def succeed(deployment: Processes, *runs: str) -> None:
    for run in runs:
        until(lambda run=run: deployment.status(run) == "SUCCESS", "they all succeed")


def test_a_deployment_takes_as_many_connections_as_is_said(
    deployment: Processes, lived: Platform, server: Server
) -> None:
    deployment.limit_pool("postgres", RUNS)
    lived.lose_facts()
    databases = {"the platform's": "platform", "Dagster's storage": "dagster"}
    with counted(server.postgres.url(), databases) as most, lived.held() as let_go:
        runs = [deployment.materialize(day) for day in (lived.days() * 2)[:RUNS]]
        until(lambda: lived.a_run_waits(RUNS), "all runs are at work")
        let_go()
        succeed(deployment, *runs)
    deployment.limit_pool("postgres", 4)
    for database, seen in most.items():
        assert RUNS <= seen <= said(database), most


def test_runs_that_get_no_connection_to_the_platform_wait_and_try_again(
    deployment: Processes, lived: Platform, server: Server
) -> None:
    days = lived.days()
    lived.lose_facts()
    # The test itself has two, and holds what the runs write.
    with server.limited("platform", 3), lived.held() as let_go:
        runs = [deployment.materialize(day) for day in days]
        until(
            lambda: any("too many connections" in deployment.told(run) for run in runs),
            "one is told that there are too many",
        )
        let_go()
        succeed(deployment, *runs)
    assert lived.is_repaired()


def test_a_storage_without_connections_is_survived_by_all(
    deployment: Processes, lived: Platform, server: Server
) -> None:
    with held_run(deployment, lived) as (run, let_go):
        with server.limited("dagster", 0):
            log = deployment.log("daemon")
            until(lambda: "too many connections" in log.read_text(), "the daemon is told so")
        let_go()
    until(lambda: is_ready(deployment.web_port), "the web server works again")
    until(lambda: ended_well(deployment, run), "the run, or its second try, succeeds")
    succeed(deployment, deployment.launch())
    assert lived.is_repaired()


def ended_well(deployment: Processes, run: str) -> bool:
    return any(deployment.status(one) == "SUCCESS" for one in (run, *deployment.retries_of(run)))


def test_a_run_whose_process_is_killed_is_found_and_done_again_once(
    deployment: Processes, lived: Platform
) -> None:
    """Its place in the pool, the only one, is free for the second try."""
    deployment.limit_pool("postgres", 1)
    with held_run(deployment, lived) as (run, let_go):
        until(lambda: bool(deployment.processes_of(run)), "its process is known")
        os.kill(deployment.processes_of(run)[0], signal.SIGKILL)
        until(lambda: deployment.status(run) == "FAILURE", "the dead run is found")
        until(lambda: len(deployment.retries_of(run)) == 1, "it is launched again")
        let_go()
    succeed(deployment, *deployment.retries_of(run))
    deployment.limit_pool("postgres", 4)
    assert lived.day_is_right()


def test_a_server_that_restarts_under_all_of_them_is_survived(
    deployment: Processes, lived: Platform, server: Server, environment: dict[str, str]
) -> None:
    day, _ = lived.busiest_day()
    lived.lose_facts()
    holding = ExitStack()
    holding.enter_context(lived.held())
    run = deployment.materialize(day)
    until(lived.a_run_waits, "the run waits for the lock")
    server.stop()
    with suppress(psycopg.OperationalError):
        holding.close()
    server.start()
    # The very first requests: nobody else has tried the connections that the web servers kept.
    assert run in deployment.runs()
    deployment.days_by_status()
    until(lambda: ended_well(deployment, run), "the run, or its second try, succeeds")
    succeed(deployment, deployment.launch())
    with server.connect("platform") as connection:
        assert Platform(connection, environment).is_repaired()
