"""What the web server adds: the platform's own calls, and metrics."""

import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copy
from statistics import median

import requests

from benchmarks.operations._platform import OUTBOX_ROWS, fill_outbox, sample, split
from benchmarks.operations._table import Row, show
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.serve.tokens import Grant, make_token
from everruns_pipelines_tests.deployment import (
    ROOT,
    LiveDeployment,
    free_port,
    live_deployment,
)

BACKFILLS = 10
SCRAPES = 50
IN_FLIGHT = 50
FLIGHTS = 3


def main() -> None:
    """Measure, and print beside the targets."""
    show("The web server", api(), scrapes())


def api() -> Generator[Row]:
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


def scrapes() -> Generator[Row]:
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
            for _ in range(SCRAPES):
                started = time.perf_counter()
                headers = {"Authorization": f"Bearer {token}"}
                requests.get(f"{live.url}/metrics", headers=headers, timeout=60).raise_for_status()
                seconds.append(time.perf_counter() - started)
        finally:
            live.stop("webserver")
    told = f"{median(seconds) * 1000:.1f} ms, at most {max(seconds) * 1000:.1f} ms"
    yield f"/metrics, {OUTBOX_ROWS:,} outbox rows, half of them due", told, "< 50 ms"
