"""How long damage lasts when nobody does anything, shown once on a real deployment.

Rows of every fact are deleted, and others spoiled, just after a look that has found nothing.
"""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from benchmarks.operations._table import Row, show
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.damage import damage, facts
from everruns_pipelines_tests.deployment import live_deployment, until
from everruns_pipelines_tests.receiver import Receiver
from everruns_pipelines_tests.reporting.world import drain_all

DAYS = 500
EVENTS = 4000
MOST_SECONDS = 1800
_FAILED = "no_damaged_rows failed"


def main() -> None:
    """Measure, and print beside the target."""
    show("Damage", healing())


def healing() -> Generator[Row]:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        Receiver.listening() as receiver,
    ):
        environment = {
            "EVERRUNS_HOME": f"{directory}/everruns",
            "EVERRUNS_ALERT_URLS": receiver.url,
        }
        postgres = PostgresDatabase(Settings.from_environment(environment))
        with postgres.connect() as connection:
            prepare(connection)
            load_sample_data(connection, events=EVENTS, days=DAYS, enqueued_share=0)
            while enqueue(connection, BackfillRequest(limit=10_000))["enqueued"]:
                drain_all(connection)
            sound = facts(connection)
            with live_deployment(Path(directory), environment) as live:
                live.start_healing()
                until(live.has_found_all_right, "a look finds all right", MOST_SECONDS)
                began = time.monotonic()
                damage(connection)
                until(lambda: facts(connection) == sound, "all are right", MOST_SECONDS)
                healed = time.monotonic() - began
                until(lambda: _told(receiver, _FAILED), "people are told", MOST_SECONDS)
                told = time.monotonic() - began
                until(lambda: _told(receiver, "over: ", _FAILED), "it is over", MOST_SECONDS)
                over = time.monotonic() - began
    yield (
        "facts of last year deleted, others spoiled, until all are right",
        f"{healed:.0f} s",
        "< 360 s",
    )
    yield "  until people are told", f"{told:.0f} s", "reported"
    yield "  until they are told that it is over", f"{over:.0f} s", "reported"


def _told(receiver: Receiver, *texts: str) -> bool:
    return any(all(text in message["title"] for text in texts) for message in receiver.got)
