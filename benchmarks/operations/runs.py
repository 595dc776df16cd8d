"""What a run costs from launch to counts, and where its time goes."""

import time
from collections.abc import Generator
from statistics import median

from benchmarks.operations._platform import sample, split
from benchmarks.operations._table import Row, show
from everruns_pipelines.client import Deployment
from everruns_pipelines_tests.deployment import live_deployment

BACKFILLS = 10
LIMIT = 1000


def main() -> None:
    """Measure, and print beside the targets."""
    show("A run", backfills())


def backfills() -> Generator[Row]:
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
