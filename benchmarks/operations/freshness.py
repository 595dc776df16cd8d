"""How long a fact takes from the enqueuing of its source, on a real deployment.

Runs of the outbox sensor linger for a minute here, not for ten, so that some relieve others in the
time that is measured.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from statistics import median, quantiles
from threading import Event, Thread

from benchmarks.operations._platform import sample
from benchmarks.operations._table import Row, show
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines_tests.deployment import live_deployment, until

PER_SECOND = 100
SECONDS = 75
LINGER_SECONDS = 60

_AT_ONCE = 10
_LOOK_SECONDS = 0.02


def main() -> None:
    """Measure, and print beside the targets."""
    show(f"Fresh facts at {PER_SECOND} rows/s", freshness())


def freshness() -> Generator[Row]:
    with sample(events=400) as (settings, home):
        environment = {
            "EVERRUNS_HOME": str(settings.home),
            "EVERRUNS_LINGER_SECONDS": str(LINGER_SECONDS),
        }
        postgres = PostgresDatabase(settings)
        with (
            live_deployment(home, environment),
            postgres.connect() as connection,
            _application(postgres) as waiting,
        ):
            until(lambda: _has_caught_up(connection, waiting), "the first run has caught up")
            seconds: list[float] = []
            ends = time.monotonic() + SECONDS
            while time.monotonic() < ends:
                seconds += _arrived(connection, waiting)
                time.sleep(_LOOK_SECONDS)
    yield (
        f"enqueue to committed fact, median of {len(seconds):,} rows",
        f"{median(seconds):.2f} s",
        "< 2 s",
    )
    yield "  99th percentile", f"{quantiles(seconds, n=100)[98]:.2f} s", "reported"
    yield "  the slowest", f"{max(seconds):.2f} s", "reported"
    yield "  still waiting at the end", f"{len(waiting):,} rows", "reported"


@contextmanager
def _application(postgres: PostgresDatabase) -> Generator[dict[str, float]]:
    """Enqueues events for as long as the context; the facts to come, and when each was enqueued."""
    waiting: dict[str, float] = {}
    ended = Event()

    def work() -> None:
        with postgres.connect() as connection:
            due = time.monotonic()
            sequence = 1_000_000
            while not ended.wait(max(0.0, due - time.monotonic())):
                due += _AT_ONCE / PER_SECOND
                sequence += _AT_ONCE
                keys = connection.execute(
                    _ENQUEUE, {"sequence": sequence, "most": _AT_ONCE}
                ).fetchall()
                waiting.update((key, time.monotonic()) for (key,) in keys)

    thread = Thread(target=work)
    thread.start()
    try:
        yield waiting
    finally:
        ended.set()
        thread.join()


def _has_caught_up(connection: Connection, waiting: dict[str, float]) -> bool:
    return bool(_arrived(connection, waiting)) and len(waiting) <= PER_SECOND


def _arrived(connection: Connection, waiting: dict[str, float]) -> list[float]:
    """How long each fact took that is there now, in seconds. None of them waits any more."""
    keys = connection.execute(
        "SELECT source_key FROM fact_tool_call WHERE source_key = ANY (%s)", [list(waiting)]
    ).fetchall()
    now = time.monotonic()
    return [now - waiting.pop(key) for (key,) in keys]


# What an application does, in one transaction: it appends events, and enqueues them.
_ENQUEUE = """
WITH session AS (SELECT id, org_id FROM sessions ORDER BY id LIMIT 1),
appended AS (
    INSERT INTO events (session_id, sequence, event_type, data)
    SELECT id, %(sequence)s + number, 'tool.completed', '{"tool_name": "t", "success": true}'
    FROM session, generate_series(1, %(most)s) AS number
    RETURNING id
),
enqueued AS (
    INSERT INTO reporting_outbox (org_id, source_type, source_id, source_version, reason)
    SELECT org_id, 'event', appended.id, appended.id, 'event_projection' FROM session, appended
)
SELECT 'event:' || id FROM appended
"""
