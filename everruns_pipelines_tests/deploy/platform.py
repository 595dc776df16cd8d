"""A platform whose runs can be held where they are, by a lock on the table that they write."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection


@dataclass
class Platform:
    """A database of sample data, and one beside it for Dagster."""

    connection: Connection
    environment: dict[str, str]

    @contextmanager
    def held(self) -> Generator[Callable[[], None]]:
        """No run can write the facts of sessions, until it is let go or the context ends."""
        with psycopg.connect(self.environment["EVERRUNS_POSTGRES_URL"]) as connection:
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

    def busiest_day(self) -> tuple[str, int]:
        """A day, and how many sessions began on it."""
        row = self.connection.execute(
            "SELECT (created_at AT TIME ZONE 'UTC')::date::text, count(*) FROM sessions"
            " GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
        ).fetchone()
        assert row is not None
        return row


@contextmanager
def platform(home: Path, name: str) -> Generator[Platform]:
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
        }
        url = environment["EVERRUNS_POSTGRES_URL"]
        with psycopg.connect(url, autocommit=True) as connection:
            load_sample_data(connection, events=600, days=2, enqueued_share=0)
            yield Platform(connection, environment)
        for database in (own, storage):
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))
