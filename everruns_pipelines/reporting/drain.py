"""Drains the outbox: claims batch after batch, and projects each in one transaction."""

from collections.abc import Generator
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.postgres import Connection, transaction
from everruns_pipelines.reporting.catalog import EVENT, LLM_GENERATION, SESSION, USAGE_LEDGER
from everruns_pipelines.reporting.database import require_org
from everruns_pipelines.reporting.outbox import Claim, Outbox
from everruns_pipelines.reporting.projector import (
    Outcome,
    project_selection,
    projections_of,
    stage,
)

# Sessions come last: projectors do them one after the other.
_ORDER = (EVENT, LLM_GENERATION, USAGE_LEDGER, SESSION)
_RACES = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
_TRIES = 5
_SELECTED = sql.SQL(
    "SELECT org_id, source_id FROM pg_temp.batch"
    " WHERE source_type = %(source_type)s AND source_id IS NOT NULL"
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
    connection: Connection,
    *,
    org_id: int | None = None,
    batch_size: int = 1,
    max_rows: int | None = None,
) -> None:
    """Refuse what `drain` could not do.

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
    if org_id is not None:
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
    claimed = 0
    with Outbox.opened(connection, max_attempts) as outbox:
        while max_rows is None or claimed < max_rows:
            size = batch_size if max_rows is None else min(batch_size, max_rows - claimed)
            claim = outbox.claim(size, org_id)
            if claim is None:
                return
            claimed += claim.size
            try:
                batch = _project(connection, outbox, claim)
            except BaseException:
                if not connection.closed:
                    outbox.release(claim)
                raise
            yield batch


def _project(connection: Connection, outbox: Outbox, claim: Claim) -> Drained:
    for _ in range(_TRIES - 1):
        try:
            return _project_once(connection, outbox, claim)
        except _RACES:
            continue
    return _project_once(connection, outbox, claim)


def _project_once(connection: Connection, outbox: Outbox, claim: Claim) -> Drained:
    total = Outcome()
    with transaction(connection):
        # A batch looks rows up by key. The default assumes a spinning disk, and scans instead.
        connection.execute("SET LOCAL random_page_cost = 1.1")
        outbox.take(claim)
        for source in _ORDER:
            staged = stage(connection, _SELECTED, {"source_type": source.type})
            outcome = project_selection(connection, projections_of(source), 1, staged)
            outbox.fail(source, outcome.failures)
            total.add(Outcome(outcome.counts))
        finished = outbox.finish(claim)
    return Drained(claim.size, finished.completed, finished.failed, finished.parked, total)
