"""Drains the outbox: claims batch after batch, and projects each in one transaction."""

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from everruns_pipelines.databases.postgres import (
    Connection,
    PostgresDatabase,
    transaction,
    tried_again,
)
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.reporting.catalog import EVENT, LLM_GENERATION, SESSION, USAGE_LEDGER
from everruns_pipelines.reporting.database import require_org
from everruns_pipelines.reporting.outbox import Claim, Outbox
from everruns_pipelines.reporting.projector import (
    Outcome,
    project_selection,
    projections_of,
    stage,
    staged_parts,
)

# Sessions come last, when all else is finished: projectors do them one after the other, and wait
# until the one before has committed.
_ORDER = ((EVENT, LLM_GENERATION, USAGE_LEDGER), (SESSION,))
_PROJECTORS = 2
# A batch that is nearly done may finish, and one that is cancelled give back its rows.
_LAST_SECONDS = 1
_SELECTED = sql.SQL(
    "SELECT source_type, org_id, source_id FROM pg_temp.batch WHERE source_id IS NOT NULL"
)


LARGEST_BATCH = 100_000


@dataclass
class Drained:
    """What was done: outbox rows by how they ended, and what was written where.

    Parked rows are among the failed. Claimed ones that are neither completed nor failed have been
    enqueued again meanwhile, or taken over by another projector.
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


def check(
    connection: "Connection | None",
    *,
    org_id: int | None = None,
    batch_size: int = 1,
    max_rows: int | None = None,
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
) -> Generator[Drained]:
    """Project what is due, until nothing is or `max_rows` outbox rows have been claimed.

    Args:
        connection: in autocommit mode; nothing else may use it inside a batch.
        max_attempts: attempts after which a row that fails is parked.
        org_id: the one organization to project; None for all.
        batch_size: outbox rows per transaction.
        max_rows: outbox rows in all; None for no bound.

    Yields:
        What each batch did, once it is committed.

    Raises:
        psycopg.Error: the database refused or went away. The batch at work is given back.
    """
    yield from _drain(connection, _Budget(batch_size, max_rows), max_attempts, org_id)


def drain_in_parallel(
    postgres: PostgresDatabase,
    *,
    org_id: int | None = None,
    batch_size: int = 5000,
    max_rows: int | None = None,
) -> Generator[Drained]:
    """Drain with several projectors at once, each on a connection of its own; see `drain`.

    Most of the time goes into PostgreSQL's indexes, where one connection uses one processor.
    Stopped in the middle, the projectors give back the batches that they are working on.
    """
    budget = _Budget(batch_size, max_rows)
    done: SimpleQueue[Drained | Exception | None] = SimpleQueue()
    connections: list[Connection] = []

    def project() -> None:
        try:
            with postgres.connect() as connection:
                connections.append(connection)
                attempts = postgres.settings.reporting_max_attempts
                for batch in _drain(connection, budget, attempts, org_id):
                    done.put(batch)
        except Exception as error:
            budget.close()
            done.put(error)
        done.put(None)

    projectors = [Thread(target=project, name=f"projector-{n}") for n in range(_PROJECTORS)]
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
        budget.close()
        _join(projectors, connections)
    if failures:
        raise failures[0]


def _join(projectors: list[Thread], connections: list[Connection]) -> None:
    """Wait for the projectors, and cancel what they wait for."""
    for projector in projectors:
        projector.join(_LAST_SECONDS)
    while any(projector.is_alive() for projector in projectors):
        for connection in connections:
            with suppress(psycopg.Error):  # closed meanwhile
                connection.cancel_safe(timeout=_LAST_SECONDS)
        for projector in projectors:
            projector.join(_LAST_SECONDS)


def _until_all_ended(
    done: "SimpleQueue[Drained | Exception | None]", projectors: int
) -> Generator[Drained | Exception]:
    while projectors:
        outcome = done.get()
        if outcome is None:
            projectors -= 1
        else:
            yield outcome


class _Budget:
    """How many outbox rows may still be claimed, by several projectors."""

    def __init__(self, batch_size: int, max_rows: int | None) -> None:
        self._batch_size = batch_size
        self._left = max_rows
        self._lock = Lock()

    def take(self) -> int:
        """The size of the next batch; 0 if there is to be none."""
        with self._lock:
            if self._left is None:
                return self._batch_size
            size = min(self._batch_size, self._left)
            self._left -= size
            return size

    def give_back(self, size: int) -> None:
        """Return what was taken and not claimed."""
        with self._lock:
            if self._left is not None:
                self._left += size

    def close(self) -> None:
        """Let no further batch begin."""
        with self._lock:
            self._batch_size = 0
            self._left = 0


def _drain(
    connection: Connection, budget: _Budget, max_attempts: int, org_id: int | None
) -> Generator[Drained]:
    with Outbox.opened(connection, max_attempts) as outbox:
        while size := budget.take():
            claim = outbox.claim(size, org_id)
            budget.give_back(size - (claim.size if claim else 0))
            if claim is None:
                return
            try:
                batch = tried_again(partial(_project, connection, outbox, claim))
            except BaseException:
                if connection.info.transaction_status == TransactionStatus.ACTIVE:
                    # Interrupted within a statement: only its end makes the connection let go.
                    connection.cancel_safe()
                    connection.close()
                elif not connection.closed:
                    outbox.release(claim)
                raise
            yield batch


def _project(connection: Connection, outbox: Outbox, claim: Claim) -> Drained:
    done = Drained(claim.size)
    with transaction(connection):
        # A batch looks rows up by key. The default assumes a spinning disk, and scans instead.
        connection.execute("SET LOCAL random_page_cost = 1.1")
        stage(connection, _SELECTED, {})
        parts = staged_parts(connection)
        for sources in _ORDER:
            for source in sources:
                if source.type in parts:
                    part = parts[source.type]
                    outcome = project_selection(connection, projections_of(source), *part)
                    outbox.fail(source, outcome.failures)
                    done.outcome.add(Outcome(outcome.counts))
            finished = outbox.finish(claim, of_sessions=SESSION in sources)
            done.add(Drained(0, finished.completed, finished.failed, finished.parked))
        outbox.forget(claim)
    return done
