"""What a launcher costs until a run's first statement, what a second worker gains, and how many
connections it takes.
"""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median

import psycopg

from benchmarks.operations._table import Row, show
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url, stop_server
from everruns_pipelines_tests.deploy.deployments import (
    celery,
    fake_cluster,
    kubernetes,
    one_machine,
)
from everruns_pipelines_tests.deploy.platform import Platform, counted, platform
from everruns_pipelines_tests.deploy.processes import Processes
from everruns_pipelines_tests.deployment import until

LAUNCHES = 3
AT_REST_SECONDS = 15
DAYS, EVENTS, DAYS_PER_RUN = 60, 60_000, 15

_WAITS = """
SELECT extract(epoch FROM backend_start)::float8
FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND application_name = 'everruns_pipelines'
    AND datname = current_database()
"""


def main() -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        show("Beyond one machine", launches(home), backfills(home))
        stop_server(home)


def launches(home: Path) -> Generator[Row]:
    """From the UI's Materialize to the connection over which the run's first statement goes."""
    with platform(home, "launch") as lived:
        with one_machine(_made(home, "local"), lived.environment, runs=5) as deployment:
            yield _launches("a process of the code server", deployment, lived)
        with celery(_made(home, "celery"), lived.environment) as deployment:
            deployment.start_worker("first", processes=1)
            yield _launches("a Celery worker", deployment, lived)
        pods = _made(home, "pods"), _made(home, "pod-logs")
        with (
            fake_cluster(*pods, lived.environment) as cluster,
            kubernetes(_made(home, "kubernetes"), lived.environment, cluster) as deployment,
        ):
            yield _launches("a Kubernetes Job's process, without the cluster", deployment, lived)


def _made(home: Path, name: str) -> Path:
    made = home / name
    made.mkdir()
    return made


def _launches(what: str, deployment: Processes, lived: Platform) -> Row:
    day, _ = lived.busiest_day()
    seconds: list[float] = []
    for _ in range(LAUNCHES + 1):
        lived.lose_facts()
        with lived.held() as let_go:
            launched = time.time()
            run = deployment.materialize(day)
            until(lived.a_run_waits, "the run is at work")
            row = lived.connection.execute(_WAITS).fetchone()
            assert row is not None
            seconds.append(row[0] - launched)
            let_go()
        until(lambda run=run: deployment.status(run) == "SUCCESS", "the run succeeds")
    told = f"{median(seconds[1:]):.1f} s"
    return f"launch to first statement, by {what}, median of {LAUNCHES}", told, "reported"


def backfills(home: Path) -> Generator[Row]:
    """A fact that is lost as a whole, and the connections at rest and at work."""
    with platform(home, "days", events=EVENTS, days=DAYS) as lived:
        environment = {**lived.environment, "EVERRUNS_MAX_PARTITIONS_PER_RUN": str(DAYS_PER_RUN)}
        databases = {"platform": "days_platform", "storage": "days_dagster"}
        with celery(_made(home, "many"), environment) as deployment:
            deployment.start_worker("first", processes=1)
            runs = -(-len(lived.days()) // DAYS_PER_RUN)
            _backfilled(deployment, lived)  # warm
            one = _backfilled(deployment, lived)
            deployment.start_worker("second", processes=1)
            before = _weight(lived)
            with counted(embedded_postgres_url(home, "postgres"), databases) as at_work:
                two = _backfilled(deployment, lived)
            weight = (_weight(lived) - before) / runs
            with counted(embedded_postgres_url(home, "postgres"), databases) as at_rest:
                time.sleep(AT_REST_SECONDS)
    what = f"{DAYS} days of {EVENTS:,} events' sessions in {runs} runs"
    yield f"{what}, on one worker", f"{one:.1f} s", "reported"
    yield f"{what}, on two workers", f"{two:.1f} s", "reported"
    what = f"Dagster's storage grows by, for a run of {DAYS_PER_RUN} days"
    yield what, f"{weight / 1000:,.0f} kB", "reported"
    for when, most in (("at rest", at_rest), ("with two runs at work", at_work)):
        told = ", ".join(f"{number} to the {name}" for name, number in most.items())
        yield f"connections {when}", told, "reported"


def _backfilled(deployment: Processes, lived: Platform) -> float:
    """Seconds until every day of a fact is there again."""
    lived.lose_facts()
    days = lived.days()
    started = time.perf_counter()
    backfill = deployment.materialize_days(days)

    def is_done() -> bool:
        runs = deployment.runs_of_backfill(backfill).values()
        return bool(runs) and all(run["status"] == "SUCCESS" for run in runs)

    until(is_done, "the backfill is done", 300)
    taken = time.perf_counter() - started
    assert lived.is_repaired()
    return taken


def _weight(lived: Platform) -> int:
    """Bytes of Dagster's storage."""
    with psycopg.connect(lived.environment["EVERRUNS_DAGSTER_POSTGRES_URL"]) as storage:
        row = storage.execute("SELECT pg_database_size(current_database())").fetchone()
        assert row is not None
        return row[0]
