"""A batch: due rows are taken, projected, and completed or failed, in one transaction.

While it lasts, whoever enqueues one of its rows waits for it: so it is kept short, and nothing in
it waits for another projector.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from threading import Event

import psycopg

from everruns_pipelines.databases.postgres import Connection, transaction, tried_again
from everruns_pipelines.reporting.catalog import (
    EVENT,
    LLM_GENERATION,
    SESSION,
    USAGE_LEDGER,
    Source,
)
from everruns_pipelines.reporting.deaths import Deaths
from everruns_pipelines.reporting.outbox import Outbox, Taken
from everruns_pipelines.reporting.projector import (
    Outcome,
    lock_sessions,
    project_selection,
    projections_of,
    try_lock_sessions,
)

_BEFORE_SESSIONS = (EVENT, LLM_GENERATION, USAGE_LEDGER)

_SECONDS = 0.2  # that a batch should take
_LEAST = 1000  # rows: of fewer, what a batch costs however large it is would be most of it
_SHORT_WAIT = "SET LOCAL lock_timeout = '200ms'"
_LOCKED_SECONDS = 60


@dataclass
class Drained:
    """What was done: outbox rows by how they ended, and what was written where.

    Parked rows are among the failed.
    """

    claimed: int = 0
    completed: int = 0
    failed: int = 0
    parked: int = 0
    outcome: Outcome = field(default_factory=Outcome)

    def add(self, batch: "Drained") -> None:
        """Take in what another batch did."""
        self.claimed += batch.claimed
        self.completed += batch.completed
        self.failed += batch.failed
        self.parked += batch.parked
        self.outcome.add(batch.outcome)

    def result(self) -> dict[str, int]:
        """The counts of the interface."""
        return {
            "claimed": self.claimed,
            "completed": self.completed,
            "failed": self.failed,
            "parked": self.parked,
        }


class Pace:
    """How many rows a batch takes: as many as fit into the time that it may take."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self.size = min(largest, _LEAST)

    def follow(self, rows: int, seconds: float) -> None:
        """Learn from a batch of so many rows."""
        fitting = int(rows * _SECONDS / max(seconds, 0.001))
        if fitting < self.size or rows >= self.size:
            self.size = min(max(fitting, _LEAST), 2 * self.size, self._largest)

    def slow_down(self) -> None:
        """Be half as fast at most: the connection was lost, perhaps since a batch took long."""
        self._largest = max(1, self.size // 2)
        self.size = min(self._largest, _LEAST)


class Batches:
    """Batches on one connection, one after the other."""

    def __init__(
        self, connection: Connection, outbox: Outbox, deaths: Deaths, pace: Pace, stop: Event
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._deaths = deaths
        self._pace = pace
        self._stop = stop
        self._awaits_sessions = False

    def project(self, size: int, cutoff: datetime) -> Drained | None:
        """Project up to `size` rows that were due at the cutoff; None if there are none, or
        if it is to stop while it waits for somebody's lock.

        Raises:
            psycopg.Error: the database refused or went away; nothing of the batch is done.
        """
        deadline = time.monotonic() + _LOCKED_SECONDS
        while True:
            started = time.monotonic()
            try:
                drained = tried_again(partial(self._project, size, cutoff))
            except psycopg.errors.LockNotAvailable:
                # Not a projector of ours: a day that is made right, a migration. Our rows are free
                # for others while we wait.
                if time.monotonic() > deadline:
                    raise
                if self._stop.wait(_SECONDS):
                    return None
                continue
            if drained is not None:
                self._pace.follow(drained.claimed, time.monotonic() - started)
            return drained

    def _project(self, size: int, cutoff: datetime) -> Drained | None:
        deaths = self._deaths
        if deaths.is_cautious and deaths.part is None:
            with transaction(self._connection):
                if self._outbox.take(size, cutoff).rows:
                    deaths.name_batch()
            deaths.is_cautious = False
        drained = None
        if deaths.part is None:
            drained = self._batch(partial(self._outbox.take, size, cutoff))
            if drained is None:
                deaths.choose_part(cutoff, self._outbox.org_id)
        if drained is None and deaths.part is not None:
            drained = self._batch(partial(deaths.take_part, size, cutoff, self._outbox.org_id))
            deaths.part = None
        return drained

    def _batch(self, take: Callable[[], Taken]) -> Drained | None:
        connection = self._connection
        with transaction(connection):
            if self._awaits_sessions:
                # Nothing else is due. Before any row is taken: so nobody waits for a row while we
                # wait for a projector.
                lock_sessions(connection)
            connection.execute(_SHORT_WAIT)
            taken = take()
            drained = self._project_batch(taken) if taken.rows else None
            if self._deaths.part is not None:
                self._deaths.acquit()
        return drained

    def _project_batch(self, taken: Taken) -> Drained:
        drained = Drained(taken.rows)
        for source in _BEFORE_SESSIONS:
            self._project_source(source, taken, drained)
        self._finish(taken.rows - taken.sessions, drained, of_sessions=False)
        # Sessions come last: until the transaction has ended, nobody else projects any.
        self._awaits_sessions = False
        if taken.sessions and try_lock_sessions(self._connection):
            self._project_source(SESSION, taken, drained)
            self._finish(taken.sessions, drained, of_sessions=True)
        elif taken.sessions:
            drained.claimed -= self._outbox.leave_sessions()
            self._awaits_sessions = drained.claimed == 0
        return drained

    def _project_source(self, source: Source, taken: Taken, drained: Drained) -> None:
        for part in taken.parts:
            if part.source_type == source.type:
                outcome = project_selection(
                    self._connection,
                    projections_of(source),
                    part.first,
                    part.last,
                    facts=part.facts,
                )
                drained.outcome.add(Outcome(outcome.counts))

    def _finish(self, rows: int, drained: Drained, *, of_sessions: bool) -> None:
        finished = self._outbox.finish(rows, of_sessions=of_sessions)
        drained.completed += finished.completed
        drained.failed += finished.failed
        drained.parked += finished.parked
