"""A platform whose runs can be held where they are, by a lock on the table that they write."""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import psycopg
from psycopg import sql

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection

_NOT_OURS = "a test"


@dataclass
class Platform:
    """A database of sample data, and one beside it for Dagster."""

    connection: Connection
    environment: dict[str, str]

    @contextmanager
    def held(self) -> Generator[Callable[[], None]]:
        """No run can write the facts of sessions, until it is let go or the context ends."""
        url = self.environment["EVERRUNS_POSTGRES_URL"]
        with psycopg.connect(url, application_name=_NOT_OURS) as connection:
            connection.execute("LOCK TABLE fact_session IN EXCLUSIVE MODE")
            yield connection.commit

    def a_run_waits(self, runs: int = 1) -> bool:
        waiting = self.connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND application_name = 'everruns_pipelines' AND datname = current_database()"
        )
        return waiting.fetchone() == (runs,)

    def lose_facts(self) -> None:
        self.connection.execute(
            "DELETE FROM fact_session WHERE session_id IN (SELECT id FROM sessions)"
        )

    def day_is_right(self) -> bool:
        """Whether the facts of the busiest day are all there."""
        day, sessions = self.busiest_day()
        counted = self.connection.execute(
            "SELECT count(*) FROM fact_session WHERE time_bucket_day = %s", [day]
        )
        return counted.fetchone() == (sessions,)

    def is_repaired(self) -> bool:
        counted = self.connection.execute(
            "SELECT (SELECT count(*) FROM fact_session) = (SELECT count(*) FROM sessions)"
        )
        return counted.fetchone() == (True,)

    def days(self) -> list[str]:
        """Those on which sessions began."""
        rows = self.connection.execute(
            "SELECT DISTINCT (created_at AT TIME ZONE 'UTC')::date::text FROM sessions ORDER BY 1"
        )
        return [day for (day,) in rows]

    def busiest_day(self) -> tuple[str, int]:
        """A day, and how many sessions began on it."""
        row = self.connection.execute(
            "SELECT (created_at AT TIME ZONE 'UTC')::date::text, count(*) FROM sessions"
            " GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
        ).fetchone()
        assert row is not None
        return row


@contextmanager
def platform(home: Path, name: str, *, events: int = 600, days: int = 4) -> Generator[Platform]:
    """The platform, in the embedded server."""
    own, storage = sql.Identifier(f"{name}_platform"), sql.Identifier(f"{name}_dagster")
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE everruns STRATEGY FILE_COPY").format(own)
        )
        admin.execute(sql.SQL("CREATE DATABASE {}").format(storage))
        environment = {
            "EVERRUNS_POSTGRES_URL": embedded_postgres_url(home, f"{name}_platform"),
            "EVERRUNS_DAGSTER_POSTGRES_URL": embedded_postgres_url(home, f"{name}_dagster"),
            "EVERRUNS_HOME": str(home),
            "EVERRUNS_PARTS": "reporting",
            "EVERRUNS_LINGER_SECONDS": "0",
        }
        url = environment["EVERRUNS_POSTGRES_URL"]
        with psycopg.connect(url, autocommit=True, application_name=_NOT_OURS) as connection:
            load_sample_data(connection, events=events, days=days, enqueued_share=0)
            yield Platform(connection, environment)
        for database in (own, storage):
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@contextmanager
def counted(url: str, databases: Mapping[str, str]) -> Generator[dict[str, int]]:
    """The most connections of a deployment that are seen; looks all the time.

    Args:
        databases: what to call each of them, and its name.
    """
    most = dict.fromkeys(databases, 0)
    stopped = Event()

    def look() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not stopped.wait(0.01):
                seen = dict(
                    connection.execute(
                        "SELECT datname, count(*) FROM pg_stat_activity"
                        " WHERE application_name <> %s GROUP BY 1",
                        [_NOT_OURS],
                    ).fetchall()
                )
                for called, name in databases.items():
                    most[called] = max(most[called], seen.get(name, 0))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield most
        finally:
            stopped.set()
        looking.result()
