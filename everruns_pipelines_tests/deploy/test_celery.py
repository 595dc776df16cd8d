"""Runs on Celery workers, every process real: what is killed is found and done again, once."""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import psycopg
import pytest

from everruns_pipelines_tests.deploy.deployments import CeleryProcesses, celery, held_run
from everruns_pipelines_tests.deploy.platform import Platform, platform
from everruns_pipelines_tests.deploy.processes import is_ready
from everruns_pipelines_tests.deploy.services import needs
from everruns_pipelines_tests.deployment import until

pytestmark = [pytest.mark.deploy, needs("redis-server", "redis-server")]


@pytest.fixture(scope="module")
def lived(home: Path) -> Iterator[Platform]:
    with platform(home, "celery") as made:
        yield made


@pytest.fixture(scope="module")
def deployment(
    lived: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryProcesses]:
    environment = {**lived.environment, "EVERRUNS_MAX_PARTITIONS_PER_RUN": "1"}
    with celery(tmp_path_factory.mktemp("celery"), environment, start_timeout=20) as deployment:
        deployment.start_worker("first", processes=1)
        yield deployment


def test_a_day_is_materialized_by_a_worker(deployment: CeleryProcesses, lived: Platform) -> None:
    day, sessions = lived.busiest_day()
    lived.lose_facts()

    run = deployment.materialize(day)

    until(lambda: deployment.status(run) == "SUCCESS", "the day is materialized")
    assert lived.connection.execute(
        "SELECT count(*) FROM fact_session WHERE time_bucket_day = %s", [day]
    ).fetchone() == (sessions,)


def test_many_days_are_shared_by_two_workers_within_the_bounds_of_the_pool(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    deployment.start_worker("other", processes=1)
    deployment.limit_pool("postgres", 2)
    lived.lose_facts()
    with lived.held() as let_go:
        backfill = deployment.materialize_days(days := lived.days())
        until(lambda: lived.a_run_waits(2), "two of them write")
        runs = deployment.runs_of_backfill(backfill)
        assert sorted(run["dagster/asset_partition_range_start"] for run in runs.values()) == days
        # The others wait where they take no worker.
        assert sorted(run["status"] for run in runs.values())[:-2] == ["QUEUED"] * (len(runs) - 2)
        at_work = [run for run in runs.values() if run["status"] != "QUEUED"]
        assert {worker_of(deployment, run) for run in at_work} == {"first", "other"}
        let_go()
    for run in runs:
        until(lambda run=run: deployment.status(run) == "SUCCESS", "they all succeed")
    assert lived.is_repaired()
    deployment.limit_pool("postgres", 4)
    deployment.kill("other")


def worker_of(deployment: CeleryProcesses, run: dict[str, str]) -> str:
    """Who has told that it received the run's task."""
    task = run["dagster-celery/task_id"]
    [worker] = [one for one in ("first", "other") if task in deployment.log(one).read_text()]
    return worker


def test_a_run_that_is_terminated_ends(deployment: CeleryProcesses, lived: Platform) -> None:
    with held_run(deployment, lived) as (at_work, let_go):
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
    """Its place in the pool, the only one, is free for the second try."""
    deployment.limit_pool("postgres", 1)
    with held_run(deployment, lived) as (run, let_go):
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
    deployment.limit_pool("postgres", 4)


def test_what_died_while_the_daemon_was_down_is_found_when_it_is_back(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    with held_run(deployment, lived) as (run, let_go):
        deployment.kill("daemon")
        deployment.kill("second")
        deployment.start_worker("second")
        assert deployment.status(run) == "STARTED"
        deployment.start_daemon()
        until(lambda: len(deployment.retries_of(run)) == 1, "it is launched again")
        let_go()
    [retry] = deployment.retries_of(run)
    until(lambda: deployment.status(retry) == "SUCCESS", "the second try succeeds")
    assert lived.day_is_right()
    assert deployment.retries_of(retry) == []


def test_a_range_that_is_terminated_leaves_its_days_as_they_were(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    first, *_, last = lived.days()
    before = deployment.days_by_status()
    lived.lose_facts()
    with lived.held() as let_go:
        run = deployment.materialize(first, last)
        until(lived.a_run_waits, "the run waits for the lock")
        deployment.terminate(run)
        until(lambda: deployment.status(run) == "CANCELED", "it is canceled")
        let_go()
    assert deployment.days_by_status() == before
    again = deployment.materialize(first, last)
    until(lambda: deployment.status(again) == "SUCCESS", "it can be done again")
    assert lived.is_repaired()
    assert [shown["status"] for shown in deployment.days_by_status()] == ["MATERIALIZED"]


def test_a_code_server_may_be_replaced_while_a_run_is_at_work(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    with held_run(deployment, lived) as (run, let_go):
        deployment.kill("code server")
        deployment.start_code_server()
        let_go()
    until(lambda: deployment.status(run) == "SUCCESS", "the run goes on")
    assert lived.day_is_right()
    after = deployment.launch()
    until(lambda: deployment.status(after) == "SUCCESS", "runs are launched as before")


def test_a_code_server_that_was_away_is_found_again_by_all(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    """The web server started without it; the daemon's sensors could not ask it."""
    deployment.kill("code server")
    deployment.kill("web server")
    deployment.start_web_server()
    lived.connection.execute(
        "UPDATE reporting_outbox SET status = 'pending', next_attempt_at = now()"
        " WHERE source_type = 'session'"
    )
    until(
        lambda: "UserCodeUnreachable" in deployment.log("daemon").read_text(), "sensors have failed"
    )
    assert not is_ready(deployment.web_port)

    deployment.start_code_server()

    until(lambda: is_ready(deployment.web_port), "the web server has loaded the code")
    left = "SELECT count(*) FROM reporting_outbox WHERE status <> 'completed'"
    until(lambda: lived.connection.execute(left).fetchone() == (0,), "the sensor drains")


def test_two_daemons_launch_each_run_once(deployment: CeleryProcesses, lived: Platform) -> None:
    deployment.start_daemon("second daemon")
    log = deployment.log("second daemon")
    until(lambda: "Another" in log.read_text(), "the second one says that there is another")
    lived.lose_facts()
    runs = [deployment.launch() for _ in range(6)]
    for run in runs:
        until(lambda run=run: deployment.status(run) == "SUCCESS", "they all succeed")
    deployment.kill("second daemon")
    until(lived.is_repaired, "every session has its fact, once")
    with psycopg.connect(lived.environment["EVERRUNS_DAGSTER_POSTGRES_URL"]) as storage:
        starts = storage.execute(
            "SELECT run_id, count(*) FROM event_logs"
            " WHERE dagster_event_type = 'PIPELINE_START' GROUP BY 1"
        ).fetchall()
    assert dict.fromkeys(runs, 1).items() <= dict(starts).items()


def test_the_broker_may_be_restarted_while_a_run_is_at_work(
    deployment: CeleryProcesses, lived: Platform
) -> None:
    """It forgets everything; the run is neither lost nor taken for lost."""
    with held_run(deployment, lived) as (run, let_go):
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
