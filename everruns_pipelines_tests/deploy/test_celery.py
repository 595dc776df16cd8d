"""Runs on Celery workers, every process real: what is killed is found and done again, once."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import pytest

from everruns_pipelines_tests.deploy.platform import Platform, platform
from everruns_pipelines_tests.deploy.processes import Processes, listens
from everruns_pipelines_tests.deploy.services import HOST, needs
from everruns_pipelines_tests.deployment import ROOT, free_port, until

pytestmark = [pytest.mark.deploy, needs("redis-server", "redis-server")]


@dataclass
class CeleryProcesses(Processes):
    """With Redis, and workers."""

    redis_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        broker = f"redis://{HOST}:{self.redis_port}/0"
        self.environment = {**self.environment, "EVERRUNS_CELERY_BROKER_URL": broker}

    def start_redis(self) -> None:
        command = ["redis-server", "--bind", HOST, "--port", str(self.redis_port), "--save", ""]
        self.start("redis", command, lambda: listens(self.redis_port))

    def start_worker(self, name: str, processes: int = 2) -> None:
        app = ["-A", "everruns_pipelines.orchestration.celery_worker", "worker"]
        options = ["-n", f"{name}@%h", "-c", str(processes), "-l", "INFO"]
        self.start(
            name,
            [sys.executable, "-m", "celery", *app, *options],
            lambda: " ready." in self.log(name).read_text(),
        )


@pytest.fixture(scope="module")
def lived(home: Path) -> Iterator[Platform]:
    with platform(home, "celery") as made:
        yield made


@pytest.fixture(scope="module")
def deployment(
    lived: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryProcesses]:
    deployment = CeleryProcesses(tmp_path_factory.mktemp("celery"), lived.environment)
    shipped = (ROOT / "deploy" / "celery" / "dagster.yaml").read_text()
    hasty = shipped.replace("start_timeout_seconds: 600", "start_timeout_seconds: 20")
    assert hasty != shipped
    deployment.configure(hasty)
    try:
        deployment.start_redis()
        deployment.start_code_server()
        deployment.start_web_server()
        deployment.start_daemon()
        deployment.start_worker("first", processes=1)
        yield deployment
    finally:
        deployment.close()


def test_a_day_is_materialized_by_a_worker(deployment: CeleryProcesses, lived: Platform) -> None:
    day, sessions = lived.busiest_day()
    lived.lose_facts()

    run = deployment.materialize(day)

    until(lambda: deployment.status(run) == "SUCCESS", "the day is materialized")
    assert lived.connection.execute(
        "SELECT count(*) FROM fact_session WHERE time_bucket_day = %s", [day]
    ).fetchone() == (sessions,)


def test_a_run_that_is_terminated_ends(deployment: CeleryProcesses, lived: Platform) -> None:
    day, _ = lived.busiest_day()
    lived.lose_facts()
    with lived.held() as let_go:
        at_work = deployment.materialize(day)
        until(lived.a_run_waits, "the run waits for the lock")
        until(lambda: deployment.status(at_work) == "STARTED", "it is that run")
        queued = deployment.launch()
        until(lambda: deployment.status(queued) == "STARTING", "the worker is full")

        # What has not begun, Dagster cancels by force only, and does not tell the launcher.
        deployment.terminate(queued, "MARK_AS_CANCELED_IMMEDIATELY")
        deployment.terminate(at_work, "SAFE_TERMINATE")
        until(lambda: deployment.status(queued) == "CANCELED", "what had not begun is canceled")
        until(lambda: deployment.status(at_work) == "CANCELED", "what had begun is canceled")
        assert not lived.a_run_waits()
        let_go()
    # The worker has come to the one that was queued, and left it alone.
    after = deployment.launch()
    until(lambda: deployment.status(after) == "SUCCESS", "the worker goes on")
    for run in (queued, at_work):
        assert deployment.retries_of(run) == []


def test_what_a_killed_worker_did_is_found_and_done_again_once(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    day, _ = lived.busiest_day()
    lived.lose_facts()
    with lived.held() as let_go:
        run = deployment.materialize(day)
        until(lived.a_run_waits, "the run waits for the lock")
        deployment.start_worker("second")

        deployment.kill("first")

        until(lambda: deployment.status(run) == "FAILURE", "the dead run is found")
        until(lambda: len(deployment.retries_of(run)) == 1, "it is launched again")
        let_go()
    [retry] = deployment.retries_of(run)
    until(lambda: deployment.status(retry) == "SUCCESS", "the second try succeeds")
    assert lived.day_is_right()
    assert deployment.retries_of(run) == [retry]
    assert deployment.retries_of(retry) == []


def test_a_code_server_may_be_replaced_while_a_run_is_at_work(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    day, _ = lived.busiest_day()
    lived.lose_facts()
    with lived.held() as let_go:
        run = deployment.materialize(day)
        until(lived.a_run_waits, "the run waits for the lock")
        deployment.kill("code server")
        deployment.start_code_server()
        let_go()
    until(lambda: deployment.status(run) == "SUCCESS", "the run goes on")
    assert lived.day_is_right()
    after = deployment.launch()
    until(lambda: deployment.status(after) == "SUCCESS", "runs are launched as before")


def test_the_broker_may_be_restarted_while_a_run_is_at_work(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    """It forgets everything; the run is neither lost nor taken for lost."""
    day, _ = lived.busiest_day()
    lived.lose_facts()
    with lived.held() as let_go:
        run = deployment.materialize(day)
        until(lived.a_run_waits, "the run waits for the lock")
        deployment.kill("redis")
        deployment.start_redis()
        # As long as run monitoring needs for two looks.
        looked = monotonic() + 22
        until(lambda: monotonic() > looked or deployment.status(run) != "STARTED", "two looks")
        assert deployment.status(run) == "STARTED"
        let_go()
    until(lambda: deployment.status(run) == "SUCCESS", "the run goes on")
    assert deployment.retries_of(run) == []
    after = deployment.launch()
    until(lambda: deployment.status(after) == "SUCCESS", "runs are launched as before")


def test_a_run_that_waited_longer_than_allowed_is_done_once(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    """The start timeout ends it; the worker that comes to it later leaves it alone."""
    day, _ = lived.busiest_day()
    lived.lose_facts()
    with lived.held() as let_go:
        busy = [deployment.materialize(day) for _ in range(2)]
        until(lambda: lived.a_run_waits(2), "no worker is free")
        late = deployment.launch()
        until(lambda: deployment.status(late) == "FAILURE", "it has waited for too long")
        until(lambda: len(deployment.retries_of(late)) == 1, "it is launched again")
        let_go()
    [retry] = deployment.retries_of(late)
    for run in (*busy, retry):
        until(lambda run=run: deployment.status(run) == "SUCCESS", "the others succeed")
    assert deployment.status(late) == "FAILURE"
    assert deployment.retries_of(late) == [retry]
    assert lived.is_repaired()
