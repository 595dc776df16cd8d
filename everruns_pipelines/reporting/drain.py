"""Drains the outbox: batch after batch, by several projectors at once."""

import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock, Thread

import psycopg

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.reporting.batch import Batches, Drained, Pace
from everruns_pipelines.reporting.database import require_org
from everruns_pipelines.reporting.deaths import Deaths
from everruns_pipelines.reporting.outbox import Outbox, Reached

LARGEST_BATCH = 100_000
LONGEST_LINGER = 3600  # seconds

_PROJECTORS = 2
_LOOK_SECONDS = 1
_STOP_SECONDS = 5
# Of one drain: enough to find the row that kills among as many as a batch may have.
_MOST_LOST = 40
_RECONNECT_SECONDS = 0.2


def check(
    connection: "Connection | None",
    *,
    org_id: int | None = None,
    batch_size: int = 1,
    max_rows: int | None = None,
    linger_seconds: int = 0,
) -> None:
    """Refuse what `drain` could not do.

    Args:
        connection: None where there is none: then the organization is not looked up.

    Raises:
        Refusal: a number is out of range, or there is no such organization.
    """
    for name, value, largest, least in (
        ("batch_size", batch_size, LARGEST_BATCH, 1),
        ("max_rows", 0 if max_rows is None else max_rows, 2**31 - 1, 0),
        ("linger_seconds", linger_seconds, LONGEST_LINGER, 0),
    ):
        if not least <= value <= largest:
            expected = f"a whole number from {least} to {largest}"
            raise Refusal(
                f"{name}: expected {expected}, got {value}",
                errors=(FieldError((name,), f"expected {expected}"),),
            )
    if connection is not None and org_id is not None:
        require_org(connection, org_id)


def drain(
    connection: Connection,
    *,
    max_attempts: int,
    org_id: int | None = None,
    batch_size: int = 5000,
    max_rows: int | None = None,
    linger_seconds: int = 0,
) -> Generator[Drained]:
    """Project what is due now, up to `max_rows` outbox rows.

    What becomes due meanwhile is left to the next drain: so this one ends, however busy the
    platform is.

    Args:
        connection: in autocommit mode; nothing else may use it inside a batch.
        max_attempts: attempts after which a row that fails is parked.
        org_id: the one organization to project; None for all.
        batch_size: the most outbox rows per transaction. It takes fewer where the application
            would have to wait for too long for the rows that it holds.
        max_rows: outbox rows in all; None for no bound.
        linger_seconds: stay for so long, and project what becomes due, looking every second.

    Yields:
        What each batch did, once it is committed.

    Raises:
        psycopg.Error: the database refused or went away. Nothing of the batch at work is done.
    """
    until = time.monotonic() + linger_seconds
    work = _Work(max_attempts, org_id, batch_size, until, _Budget(max_rows), Event())
    yield from _drain(connection, work, Pace(batch_size))


def drain_in_parallel(
    postgres: PostgresDatabase,
    *,
    org_id: int | None = None,
    batch_size: int = 5000,
    max_rows: int | None = None,
    linger_seconds: int = 0,
    stop: Event | None = None,
) -> Generator[Drained]:
    """Drain with several projectors at once, each on a connection of its own; see `drain`.

    Most of the time goes into PostgreSQL's indexes, where one connection uses one processor.
    Interrupted or closed in the middle, it stops the projectors: what they are at is cancelled, and
    nothing of it is done.

    Args:
        stop: once it is set, no further batch begins.
    """
    attempts = postgres.settings.reporting_max_attempts
    until = time.monotonic() + linger_seconds
    work = _Work(attempts, org_id, batch_size, until, _Budget(max_rows), stop or Event())
    done: SimpleQueue[Drained | Exception | None] = SimpleQueue()
    connections: list[Connection] = []

    def project() -> None:
        try:
            for batch in _drain_reconnecting(postgres, work, connections):
                done.put(batch)
        except Exception as error:
            work.stop.set()
            done.put(error)
        finally:
            done.put(None)

    # One that cannot be stopped, since its server does not answer, keeps no process alive.
    projectors = [
        Thread(target=project, name=f"projector-{n}", daemon=True) for n in range(_PROJECTORS)
    ]
    for projector in projectors:
        projector.start()
    failures: list[Exception] = []
    try:
        for outcome in _until_all_ended(done, len(projectors)):
            if isinstance(outcome, Exception):
                failures.append(outcome)
            else:
                yield outcome
    finally:
        work.stop.set()
        _cancel(projectors, connections)
    if failures:
        raise failures[0]


def _until_all_ended(
    done: "SimpleQueue[Drained | Exception | None]", projectors: int
) -> Generator[Drained | Exception]:
    while projectors:
        outcome = done.get()
        if outcome is None:
            projectors -= 1
        else:
            yield outcome


def _cancel(projectors: list[Thread], connections: list[Connection]) -> None:
    """Cancel whatever the projectors run, until they have noticed that they are to stop."""
    deadline = time.monotonic() + _STOP_SECONDS
    while any(projector.is_alive() for projector in projectors) and time.monotonic() < deadline:
        for connection in connections:
            # It may end just now, or its server may be gone.
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=1)
        for projector in projectors:
            projector.join(0.02)


class _Budget:
    """How many outbox rows may still be taken, by several projectors."""

    def __init__(self, max_rows: int | None) -> None:
        self._left = max_rows
        self._lock = Lock()

    @property
    def is_spent(self) -> bool:
        """Nothing more may be taken."""
        return self._left == 0

    def take(self, size: int) -> int:
        """The size of the next batch, `size` at most; 0 if there is to be none."""
        with self._lock:
            if self._left is None:
                return size
            size = min(size, self._left)
            self._left -= size
            return size

    def give_back(self, size: int) -> None:
        """Return what was allowed and not used."""
        with self._lock:
            if self._left is not None:
                self._left += size


@dataclass(frozen=True)
class _Work:
    """What the projectors of one drain share.

    Args:
        until: when they look for the last time, by the monotonic clock.
    """

    max_attempts: int
    org_id: int | None
    batch_size: int
    until: float
    budget: _Budget
    stop: Event
    reached: Reached = field(default_factory=Reached)


def _drain_reconnecting(
    postgres: PostgresDatabase, work: _Work, connections: list[Connection]
) -> Generator[Drained]:
    """Drain on a new connection whenever one is lost: what it was working on may be why.

    Raises:
        Refusal: the server is away.
        psycopg.Error: the connection was lost too often, or the database refused.
    """
    pace = Pace(work.batch_size)
    for lost in range(_MOST_LOST + 1):
        with postgres.connect() as connection:
            connections.append(connection)
            try:
                yield from _drain(connection, work, pace)
            except psycopg.Error as error:
                is_lost = isinstance(error, psycopg.errors.QueryCanceled) or connection.closed
                if not is_lost or lost == _MOST_LOST or work.stop.wait(_RECONNECT_SECONDS):
                    raise
                pace.slow_down()
            else:
                return


def _drain(connection: Connection, work: _Work, pace: Pace) -> Generator[Drained]:
    with (
        Deaths.watched(connection) as deaths,
        Outbox.opened(connection, work.max_attempts, work.org_id, work.reached) as outbox,
    ):
        batches = Batches(connection, outbox, deaths, pace, work.stop)
        while True:
            is_last_look = time.monotonic() >= work.until
            if parked := deaths.bury():
                yield Drained(claimed=parked, failed=parked, parked=parked)
            yield from _drain_due(outbox, batches, work, pace)
            if is_last_look or work.budget.is_spent or work.stop.wait(_LOOK_SECONDS):
                return


def _drain_due(outbox: Outbox, batches: Batches, work: _Work, pace: Pace) -> Generator[Drained]:
    cutoff = outbox.cutoff()
    while not work.stop.is_set() and (size := work.budget.take(pace.size)):
        batch = None
        try:
            batch = batches.project(size, cutoff)
        finally:
            work.budget.give_back(size - (batch.claimed if batch else 0))
        if batch is None:
            return
        if batch.claimed:
            yield batch
