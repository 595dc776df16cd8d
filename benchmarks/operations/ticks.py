"""What a tick of the outbox sensor costs on a large outbox of which nothing is due."""

import time
from collections.abc import Generator
from statistics import median

import dagster as dg

from benchmarks.operations._platform import OUTBOX_ROWS, fill_outbox, sample
from benchmarks.operations._table import Row, show
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.reporting.automation import reporting_outbox_sensor

TICKS = 50


def main() -> None:
    """Measure, and print beside the target."""
    show("A sensor's tick", tick())


def tick() -> Generator[Row]:
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
