"""What operating costs: loading the definitions, a sensor's idle tick, a backfill over GraphQL."""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import copy
from statistics import median
from urllib import request

import dagster as dg
import requests
from rich.console import Console
from rich.table import Table

from everruns_pipelines.client import Deployment
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.automation import reporting_outbox_sensor
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.serve.tokens import Grant, make_token
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import (
    ROOT,
    LiveDeployment,
    free_port,
    live_deployment,
)

LOADS = 7
OUTBOX_ROWS = 1_000_000
TICKS = 50
BACKFILLS = 10
LIMIT = 1000
IN_FLIGHT = 50
FLIGHTS = 3

_DAGSTER = "import dagster"
_DEFINITIONS = "from everruns_pipelines.definitions import defs; defs.get_repository_def()"


def main() -> None:
    """Measure, and print beside the targets."""
    table = Table("what", "measured", "target", title="Operations")
    for part in (load(), tick(), backfills(), api(), scrapes()):
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
            fill_outbox(connection)
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


def fill_outbox(connection: Connection) -> None:
    """A million rows, of which none is due."""
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


def api() -> Generator[tuple[str, str, str]]:
    with sample(events=400) as (settings, home):
        token, line = make_token(Grant("bench", frozenset({"reports:admin"})))
        (home / "tokens").write_text(line)
        environment = {
            "EVERRUNS_HOME": str(settings.home),
            "EVERRUNS_API_TOKENS": str(home / "tokens"),
        }
        with live_deployment(home, environment) as live:

            def asked(prefer: str) -> requests.Response:
                headers = {"Authorization": f"Bearer {token}", "Prefer": prefer}
                url = f"{live.url}/v1/reports/admin/backfill"
                return requests.post(url, headers=headers, timeout=300)

            asked("wait=300")  # the first one finds all that is missing
            overheads: list[float] = []
            for _ in range(BACKFILLS):
                started = time.perf_counter()
                assert asked("wait=300").json()["enqueued"] == 0
                seconds = time.perf_counter() - started
                overheads.append(seconds - sum(split(live.url, newest_run(live.url))))
            told = f"the run's own time + {median(overheads) * 1000:.0f} ms"
            yield "a backfill over the API, nothing missing, request to answer", told, "< 100 ms"
            before = resident(live)
            statuses: Counter[int] = Counter()
            for _ in range(FLIGHTS):
                with ThreadPoolExecutor(IN_FLIGHT) as pool:
                    answers = list(pool.map(asked, ["wait=300"] * IN_FLIGHT))
                statuses = Counter(answer.status_code for answer in answers)
                assert set(statuses) == {200, 429}, statuses
            grown = resident(live) - before
            counted = ", ".join(f"{number} x {status}" for status, number in statuses.items())
            yield f"{IN_FLIGHT} requests in flight", counted, "200 or 429"
            yield f"  memory of the server after {FLIGHTS} such", f"+{grown:.0f} MiB", "flat"


def newest_run(url: str) -> str:
    query = {"query": "{ runsOrError(limit: 1) { ... on Runs { results { runId } } } }"}
    answer = requests.post(f"{url}/graphql", json=query, timeout=60).json()
    return str(answer["data"]["runsOrError"]["results"][0]["runId"])


def resident(live: LiveDeployment) -> float:
    """MiB of memory that the web server holds."""
    status = Path(f"/proc/{live.processes['webserver'].pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def scrapes() -> Generator[tuple[str, str, str]]:
    with sample(events=60) as (settings, home):
        with PostgresDatabase(settings).connect() as connection:
            fill_outbox(connection)
            # Half of them are due.
            connection.execute(
                "UPDATE reporting_outbox SET status = 'pending' WHERE status = 'completed'"
                " AND source_id::int % 2 = 0"
            )
            connection.execute("VACUUM ANALYZE reporting_outbox")
        token, line = make_token(Grant("bench", frozenset({"metrics:read"})))
        (home / "tokens").write_text(line)
        environment = {
            "EVERRUNS_HOME": str(settings.home),
            "EVERRUNS_API_TOKENS": str(home / "tokens"),
        }
        copy(ROOT / "dagster.yaml", home)
        live = LiveDeployment(home, environment, free_port())
        live.start_webserver()
        try:
            live.wait_for_webserver()
            seconds: list[float] = []
            for _ in range(TICKS):
                started = time.perf_counter()
                headers = {"Authorization": f"Bearer {token}"}
                requests.get(f"{live.url}/metrics", headers=headers, timeout=60).raise_for_status()
                seconds.append(time.perf_counter() - started)
        finally:
            live.stop("webserver")
    told = f"{median(seconds) * 1000:.1f} ms, at most {max(seconds) * 1000:.1f} ms"
    yield f"/metrics, {OUTBOX_ROWS:,} outbox rows, half of them due", told, "< 50 ms"


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
