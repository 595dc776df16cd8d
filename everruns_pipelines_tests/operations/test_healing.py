"""A deployment that tells of damage, and repairs it without being asked."""

from pathlib import Path

import pytest

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.damage import damage, facts
from everruns_pipelines_tests.deployment import live_deployment, until
from everruns_pipelines_tests.receiver import Receiver
from everruns_pipelines_tests.reporting.world import drain_all


@pytest.mark.deploy
def test_facts_of_last_year_that_somebody_deleted_are_told_and_return_by_themselves(
    tmp_path: Path,
) -> None:
    with Receiver.listening() as receiver:
        environment = {
            "EVERRUNS_HOME": str(tmp_path / "everruns"),
            "EVERRUNS_HEAL_SECONDS": "60",
            "EVERRUNS_ALERT_URLS": receiver.url,
        }
        postgres = PostgresDatabase(Settings.from_environment(environment))
        with postgres.connect() as connection:
            prepare(connection)
            load_sample_data(connection, events=600, days=500, enqueued_share=0)
            enqueue(connection, BackfillRequest(limit=10_000))
            drain_all(connection)
            sound = facts(connection)
            with live_deployment(tmp_path, environment) as live:
                damage(connection)
                live.start_healing()
                until(lambda: facts(connection) == sound, "all facts are back", 180)
                until(lambda: _told(receiver, "no_damaged_rows failed"), "the damage is told", 120)
                until(lambda: _told(receiver, "It is over"), "that it is over is told", 240)


def _told(receiver: Receiver, text: str) -> bool:
    return any(text in f"{message['title']} {message['message']}" for message in receiver.got)
