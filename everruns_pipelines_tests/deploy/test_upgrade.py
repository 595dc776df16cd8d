"""A release rolled out and taken back: the real projectors of 0.1.0 beside ours."""

import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from uuid import uuid4

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    application_enqueues,
    archive,
    drain_all,
    enqueue_all,
    materialize,
    rows,
    value,
    wait_until,
)

RELEASE = "4c6aceeb52c1287ea892d47727a2a7ca80148ed7"  # 0.1.0

_PROJECTOR = """
from everruns_pipelines.postgres import PostgresResource
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.drain import drain
from everruns_pipelines.settings import Settings

postgres = PostgresResource(Settings.from_environment())
while True:
    with postgres.connect() as connection:
        prepare(connection)
        for batch in drain(connection, max_attempts=12, batch_size=20):
            print("completed " * batch.completed, flush=True)
"""
_PREPARE = _PROJECTOR.replace("while True", "for _ in range(1)")


def _has_release() -> bool:
    asked = ["git", "cat-file", "-e", f"{RELEASE}^{{commit}}"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not _has_release(), reason="this clone's history does not hold 0.1.0"),
]


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of 0.1.0."""
    packed = subprocess.run(
        ["git", "archive", RELEASE, "everruns_pipelines"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    directory = tmp_path_factory.mktemp("release")
    subprocess.run(["tar", "-x", "-C", directory], input=packed, check=True)
    return directory


class OldRelease:
    """Runs the code of 0.1.0, as a role."""

    def __init__(self, package: Path, home: Path) -> None:
        self._package, self._home = package, home

    def prepare(self, url: str) -> subprocess.CompletedProcess[str]:
        """Make its schema, and drain once."""
        return subprocess.run(
            self._command(_PREPARE),
            env=self._environment(url),
            cwd=self._package,
            capture_output=True,
            text=True,
            check=False,
        )

    @contextmanager
    def projector(self, url: str) -> Generator["OldProjector"]:
        """Projects all the time."""
        log = self._home / f"projector-{uuid4().hex}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(_PROJECTOR),
                env=self._environment(url),
                cwd=self._package,
                stdout=output,
                stderr=output,
            )
        try:
            yield OldProjector(process, log)
        finally:
            process.kill()
            process.wait()

    def _command(self, code: str) -> list[str]:
        return [sys.executable, "-c", code]

    def _environment(self, url: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self._package),
            "EVERRUNS_POSTGRES_URL": url,
            "EVERRUNS_HOME": str(self._home),
        }


class OldProjector:
    """A process of 0.1.0."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def completed(self) -> int:
        """How many outbox rows, so far."""
        told = self._log.read_text()
        assert self._process.poll() is None, told[-2000:]
        return told.count("completed")


@pytest.fixture
def old(old_release: Path, tmp_path: Path) -> OldRelease:
    return OldRelease(old_release, tmp_path)


@pytest.fixture
def worker_url(connection: Connection, postgres_url: str) -> str:
    """Of a role such as 0.1.0 asks for: it makes nothing in our schema."""
    role = sql.Identifier(f"role_{uuid4().hex}")
    for statement in (
        "CREATE ROLE {} LOGIN",
        "CREATE SCHEMA everruns_pipelines",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO {}",
        "GRANT USAGE ON SCHEMA everruns_pipelines TO {}",
        "ALTER DEFAULT PRIVILEGES IN SCHEMA everruns_pipelines GRANT ALL ON TABLES TO {}",
    ):
        connection.execute(sql.SQL(statement).format(role))
    info = conninfo_to_dict(postgres_url)
    name = role.as_string().strip('"')
    return f"postgresql:///{info['dbname']}?host={info['host']}&user={name}"


@contextmanager
def our_projector(url: str) -> Generator[list[int]]:
    """Projects all the time; what each drain completed."""
    settings = Settings.from_environment({"EVERRUNS_POSTGRES_URL": url})
    completed: list[int] = []
    stopped = Event()

    def project() -> None:
        while not stopped.wait(0.01):
            with PostgresDatabase(settings).connect() as connection:
                database.prepare(connection)
                completed.append(drain_all(connection, batch_size=20).completed)

    with ThreadPoolExecutor(1) as pool:
        projecting = pool.submit(project)
        try:
            yield completed
        finally:
            stopped.set()
        projecting.result()


def is_drained(connection: Connection) -> bool:
    left = "SELECT count(*) FROM reporting_outbox WHERE status <> 'completed'"
    return value(connection, left) == 0


def enqueue_again(connection: Connection) -> None:
    """What the application does to sources that change, all of them at once."""
    for (outbox_id,) in rows(connection, "SELECT id FROM reporting_outbox"):
        application_enqueues(connection, outbox_id)


def test_projectors_of_both_releases_share_the_queue(
    connection: Connection, postgres_url: str, worker_url: str, old: OldRelease
) -> None:
    done = old.prepare(postgres_url)
    assert done.returncode == 0, done.stderr
    load_adversarial_sources(connection, seed=5, sessions=8, events_per_session=20)
    connection.execute("DELETE FROM archived_events")  # 0.1.0 does not know of them
    with old.projector(worker_url) as theirs:
        enqueue_all(connection)
        wait_until(lambda: is_drained(connection) and theirs.completed(), "0.1.0 to work", 60)

        database.ensure_schema(connection)  # `init` of the new release
        with our_projector(worker_url) as ours:
            before = theirs.completed()
            for _ in range(3):
                enqueue_again(connection)
                wait_until(lambda: is_drained(connection), "both to work off the queue", 60)
            assert sum(ours) > 0
            assert theirs.completed() > before
    assert differences(connection) == []


def test_who_goes_back_works_on_and_what_it_unlearns_is_found_later(
    connection: Connection, postgres_url: str, worker_url: str, old: OldRelease
) -> None:
    database.ensure_schema(connection)
    load_adversarial_sources(connection, seed=6, sessions=4)
    archive(connection, *(one for (one,) in rows(connection, "SELECT id FROM events LIMIT 40")))
    enqueue_all(connection)
    drain_all(connection)
    assert differences(connection) == []

    # It has nothing to make in our schema, whether it might or not.
    for url in (worker_url, postgres_url):
        enqueue_again(connection)
        done = old.prepare(url)
        assert done.returncode == 0, done.stderr
        assert is_drained(connection)
    assert differences(connection) != []  # it does not know of archived events

    database.OWN.check(connection)
    enqueue(connection, BackfillRequest(limit=10_000))
    drain_all(connection)
    for (day,) in rows(
        connection,
        "SELECT DISTINCT time_bucket_day FROM fact_turn"
        " WHERE time_bucket_day BETWEEN '0001-01-02' AND '9999-12-30'",
    ):
        materialize(connection, day)
    assert differences(connection) == []
