"""Terminate stops a run in whatever it does: cancelled, not tried again, nothing left behind."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Any

import dagster as dg
import pytest

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.reporting.backfill import GLOBAL_LOCK
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.reporting.world import ephemeral, rows, value, wait_until, waiting

_SECONDS = 10

_OTHERS = (
    "SELECT state, query FROM pg_stat_activity WHERE datname = current_database()"
    " AND application_name = 'everruns_pipelines' AND pid NOT IN (SELECT unnest(%s::int[]))"
)


@dataclass
class Terminated:
    """How a run ended, and how long after it was told to."""

    result: dg.ExecuteInProcessResult
    status: dg.DagsterRunStatus
    seconds: float


def terminated(
    settings: Settings,
    job: str,
    when: Callable[[], object],
    *,
    by_a_person: bool = True,
    **execution: Any,
) -> Terminated:
    """Run a job in this process; once `when` is true, do to it what the UI's Terminate does, or
    what a machine does that is shut down.
    """
    with ephemeral() as instance, ThreadPoolExecutor(1) as pool:

        def terminate() -> float:
            wait_until(when, "the run to be at work")
            [run] = instance.get_runs()
            if by_a_person:
                instance.report_run_canceling(run)
            os.kill(os.getpid(), signal.SIGINT)
            return monotonic()

        told = pool.submit(terminate)
        result = (
            build_definitions(settings)
            .resolve_job_def(job)
            .execute_in_process(instance=instance, raise_on_error=False, **execution)
        )
        seconds = monotonic() - told.result()
        [run] = instance.get_runs()
        return Terminated(result, run.status, seconds)


def check_obeyed(run: Terminated, connection: Connection, own: list[Connection]) -> None:
    assert run.status == dg.DagsterRunStatus.CANCELED
    assert run.seconds < _SECONDS
    assert not [event for event in run.result.all_events if event.is_step_up_for_retry]
    pids = [one.info.backend_pid for one in own]
    wait_until(lambda: rows(connection, _OTHERS, [pids]) == [], "the run's statements to end")
    held = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT pid = ANY (%s)"
    assert rows(connection, held, [pids]) == []


@pytest.fixture
def sample(connection: Connection) -> Connection:
    prepare(connection)
    load_sample_data(connection, events=300, days=2, enqueued_share=1)
    return connection


def test_a_run_that_waits_for_a_lock_is_stopped_and_enqueues_nothing(
    sample: Connection, postgres: PostgresDatabase, settings: Settings
) -> None:
    sample.execute("DELETE FROM reporting_outbox")
    with postgres.connect() as other:
        other.execute("SELECT pg_advisory_lock(%s)", [GLOBAL_LOCK])
        run = terminated(settings, "backfill_reporting", lambda: waiting(sample))
        check_obeyed(run, sample, [sample, other])
    assert value(sample, "SELECT count(*) FROM reporting_outbox") == 0


def test_a_run_in_a_long_statement_is_stopped(
    sample: Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(connection: Connection, *_: object, **__: object) -> None:
        connection.execute("SELECT pg_sleep(60)")

    monkeypatch.setattr("everruns_pipelines.reporting.backfill.find_missing", long)
    asleep = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    run = terminated(settings, "backfill_reporting", lambda: rows(sample, asleep))
    check_obeyed(run, sample, [sample])


def test_projectors_that_wait_give_their_rows_back(
    sample: Connection, postgres: PostgresDatabase, settings: Settings
) -> None:
    due = value(sample, "SELECT count(*) FROM reporting_outbox")
    with postgres.connect() as other, other.transaction():
        other.execute("LOCK TABLE fact_turn, fact_session IN SHARE MODE")
        run = terminated(settings, "project_reporting", lambda: waiting(sample))
        check_obeyed(run, sample, [sample, other])
    given_back = "SELECT count(*) FROM reporting_outbox WHERE status = 'pending' AND attempts = 0"
    done = value(sample, "SELECT count(*) FROM reporting_outbox WHERE status = 'completed'")
    assert value(sample, given_back) == due - done > 0


def test_a_day_that_waits_is_stopped(
    sample: Connection, postgres: PostgresDatabase, settings: Settings
) -> None:
    day = value(sample, "SELECT max(ts)::date::text FROM events")
    with postgres.connect() as other, other.transaction():
        other.execute("LOCK TABLE fact_turn IN SHARE MODE")
        run = terminated(
            settings, "materialize_reporting", lambda: waiting(sample), partition_key=day
        )
        check_obeyed(run, sample, [sample, other])


@pytest.fixture
def lingering() -> dict[str, Any]:
    return {"ops": {"project": {"config": {"linger_seconds": 3600}}}}


def _drained(connection: Connection) -> bool:
    return (
        value(connection, "SELECT count(*) FROM reporting_outbox WHERE status <> 'completed'") == 0
    )


def test_a_run_that_lingers_is_stopped(
    sample: Connection, settings: Settings, lingering: dict[str, Any]
) -> None:
    run = terminated(settings, "project_reporting", lambda: _drained(sample), run_config=lingering)
    check_obeyed(run, sample, [sample])


def test_a_run_that_lingers_ends_in_order_when_its_process_is_told_to(
    sample: Connection, settings: Settings, lingering: dict[str, Any]
) -> None:
    """As by whoever shuts the machine down: nobody has terminated the run."""
    run = terminated(
        settings,
        "project_reporting",
        lambda: _drained(sample),
        by_a_person=False,
        run_config=lingering,
    )
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert run.seconds < _SECONDS
    assert run.result.asset_materializations_for_node("project")
