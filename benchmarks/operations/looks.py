"""What a tick of the healing sensor costs at a million events, of which none lacks its facts."""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median

import dagster as dg

from benchmarks.backfill import EVENTS, prepare_complete
from benchmarks.operations._table import Row, show
from benchmarks.projection import database
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.reporting.automation import reporting_healing_sensor
from everruns_pipelines.settings import Settings

TICKS = 5


def main() -> None:
    """Measure, and print beside the target."""
    show("A look at all history", looks())


def looks() -> Generator[Row]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        with database(home, "complete") as connection:
            for _ in prepare_complete(connection):
                pass
        url = embedded_postgres_url(home, "complete")
        postgres = PostgresDatabase(Settings.from_environment({"EVERRUNS_POSTGRES_URL": url}))
        seconds: list[float] = []
        with dg.DagsterInstance.ephemeral() as instance:  # pyright: ignore[reportUnknownMemberType]
            for _ in range(1 + TICKS):
                with dg.build_sensor_context(
                    instance=instance, resources={"everruns_postgres": postgres}
                ) as context:
                    started = time.perf_counter()
                    reporting_healing_sensor(context)
                    seconds.append(time.perf_counter() - started)
    yield (
        f"a tick of the healing sensor, {EVENTS:,} events, none missing",
        f"{median(seconds[1:]):.2f} s, the first {seconds[0]:.2f} s",
        "< 2 s",
    )
