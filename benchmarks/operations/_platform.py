"""A platform of sample data, an outbox of a million rows, and what a run's time went into."""

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib import request

import psycopg
from dagster import DagsterInstance

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import DAGSTER_DATABASE, embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT

OUTBOX_ROWS = 1_000_000

Storage = psycopg.Connection[tuple[Any, ...]]


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


@contextmanager
def storage_of(settings: Settings) -> Generator[tuple[DagsterInstance, Storage]]:
    """Dagster's storage as a deployment has it, and a connection to it."""
    url = embedded_postgres_url(settings.home, DAGSTER_DATABASE)
    os.environ["EVERRUNS_DAGSTER_POSTGRES_URL"] = url
    with (
        DagsterInstance.from_config(str(ROOT)) as instance,
        psycopg.connect(url, autocommit=True) as storage,
    ):
        yield instance, storage


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
