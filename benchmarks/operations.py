"""What operating costs: loading the definitions, a sensor's idle tick, a backfill over GraphQL."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib import request

import dagster as dg
from rich.console import Console
from rich.table import Table

from everruns_pipelines.client import Deployment
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.reporting.automation import reporting_outbox_sensor
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import live_deployment

LOADS = 7
OUTBOX_ROWS = 1_000_000
TICKS = 50
BACKFILLS = 10
LIMIT = 1000

_DAGSTER = "import dagster"
_DEFINITIONS = "from everruns_pipelines.definitions import defs; defs.get_repository_def()"


def main() -> None:
    """Measure, and print beside the targets."""
    table = Table("what", "measured", "target", title="Operations")
    for part in (load(), tick(), backfills()):
        for row in part:
            table.add_row(*row)
    Console(width=110).print(table)


def load() -> Generator[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        alone, ours = [float("inf")], [float("inf")]
        for _ in range(LOADS):
            alone.append(python_seconds(_DAGSTER, home))
            ours.append(python_seconds(_DEFINITIONS, home))
    ratio = min(ours) / min(alone)
    told = f"{min(ours):.2f} s / {min(alone):.2f} s = {ratio:.2f}"
    yield "definitions, import to resolved, against `import dagster`", told, "< 1.3"


def python_seconds(code: str, home: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, env={"EVERRUNS_HOME": home}
    )
    return time.perf_counter() - started


def tick() -> Generator[tuple[str, str, str]]:
    with sample(events=60) as (settings, _):
        postgres = PostgresDatabase(settings)
        with postgres.connect() as connection:
            connection.execute("TRUNCATE reporting_outbox")
            connection.execute(
                "INSERT INTO reporting_outbox"
                " (org_id, source_type, source_id, reason, status, next_attempt_at)"
                " SELECT 1 + number %% 3, 'event', number, 'event_projection',"
                " CASE WHEN number %% 20 = 0 THEN 'failed' ELSE 'completed' END,"
                " CASE WHEN number %% 40 = 0 THEN 'infinity'"
                " WHEN number %% 20 = 0 THEN now() + interval '1 day' ELSE now() END"
                " FROM generate_series(1, %s) AS number",
                [OUTBOX_ROWS],
            )
            connection.execute("VACUUM ANALYZE reporting_outbox")
        seconds: list[float] = []
        with dg.DagsterInstance.ephemeral() as instance:  # pyright: ignore[reportUnknownMemberType]
            for _ in range(TICKS):
                with dg.build_sensor_context(
                    instance=instance, resources={"everruns_postgres": postgres}
                ) as context:
                    started = time.perf_counter()
                    reporting_outbox_sensor(context)
                    seconds.append(time.perf_counter() - started)
    told = f"{median(seconds) * 1000:.1f} ms, at most {max(seconds) * 1000:.1f} ms"
    yield f"a tick that finds nothing, {OUTBOX_ROWS:,} outbox rows", told, "< 50 ms"


def backfills() -> Generator[tuple[str, str, str]]:
    with sample(events=40_000) as (settings, home):
        environment = {"EVERRUNS_HOME": str(settings.home)}
        with live_deployment(home, environment) as live:
            deployment = Deployment(live.url)
            ops = {"enqueue": {"limit": LIMIT}}
            deployment.run("backfill_reporting", ops)  # warm
            totals: list[float] = []
            splits: list[tuple[float, float, float]] = []
            for _ in range(BACKFILLS):
                started = time.perf_counter()
                run = deployment.launch("backfill_reporting", ops)
                assert deployment.follow(run)["enqueue"]["enqueued"] == LIMIT
                totals.append(time.perf_counter() - started)
                splits.append(split(live.url, run))
    queue, start_up, work = (median(part) for part in zip(*splits, strict=True))
    what = f"a backfill of {LIMIT:,} over GraphQL, launch to counts, median of {BACKFILLS}"
    yield what, f"{median(totals):.2f} s", "reported"
    yield "  of it in the queue", f"{queue:.2f} s", "reported"
    yield "  of it starting Python and loading the definitions", f"{start_up:.2f} s", "reported"
    yield "  of it at work", f"{work:.2f} s", "< 1 s"


def split(url: str, run: str) -> tuple[float, float, float]:
    """Seconds that a run spent in the queue, starting up, and at work."""
    query = (
        f'{{ logsForRun(runId: "{run}") {{ ... on EventConnection'
        " { events { __typename ... on MessageEvent { timestamp } } } } }"
    )
    body = json.dumps({"query": query}).encode()
    asked = request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
    with request.urlopen(asked, timeout=60) as response:
        events = json.load(response)["data"]["logsForRun"]["events"]
    at = {event["__typename"]: int(event["timestamp"]) / 1000 for event in events}
    return (
        at["RunStartingEvent"] - at["RunEnqueuedEvent"],
        at["RunStartEvent"] - at["RunStartingEvent"],
        at["RunSuccessEvent"] - at["RunStartEvent"],
    )


@contextmanager
def sample(events: int) -> Generator[tuple[Settings, Path]]:
    """Embedded databases of their own, with sample data of which nothing is enqueued."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        settings = Settings.from_environment({"EVERRUNS_HOME": str(home / "everruns")})
        with PostgresDatabase(settings).connect() as connection:
            prepare(connection)
            load_sample_data(connection, events=events, enqueued_share=0.0)
            connection.execute("ANALYZE")
        yield settings, home
