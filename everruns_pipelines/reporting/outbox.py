"""The outbox: claim, finish, fail, park, purge. The queue's rules and nothing else.

Its statements stand in `outbox.sql`, each under its name.
"""

import secrets
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.reporting.catalog import SOURCES, Source
from everruns_pipelines.reporting.projector import Failure

_PURGE_SIZE = 10_000


_SQL = read_statements("everruns_pipelines.reporting", "outbox.sql")


@dataclass(frozen=True)
class Claim:
    """Rows that this projector works on: those that are processing since `claimed_at`."""

    claimed_at: datetime
    size: int


@dataclass(frozen=True)
class Finished:
    """How many rows of a claim ended how. Parked ones are among the failed."""

    completed: int
    failed: int
    parked: int


@dataclass(frozen=True)
class Outbox:
    """A projector's hold on the queue, for the life of its connection."""

    connection: Connection
    lock_key: int
    max_attempts: int

    @classmethod
    @contextmanager
    def opened(cls, connection: Connection, max_attempts: int) -> Generator["Outbox"]:
        """Hold the lock that tells other projectors that this one lives."""
        lock_key = secrets.randbits(62)
        connection.execute("SELECT pg_advisory_lock(%s)", [lock_key])
        connection.execute(_SQL["make_batch"])
        try:
            yield cls(connection, lock_key, max_attempts)
        finally:
            if not connection.closed:
                connection.execute("SELECT pg_advisory_unlock(%s)", [lock_key])

    def claim(self, size: int, org_id: int | None = None) -> Claim | None:
        """Take up to `size` due rows, in equal shares per organization; None if none is due.

        Committed at once: the rows are processing for everybody to see. They are the temporary
        table `batch` until the next claim.
        """
        while True:
            try:
                return self._claim(size, org_id)
            except psycopg.errors.UniqueViolation:
                # Another projector claimed in the same microsecond, by which claims are told apart.
                continue

    def _claim(self, size: int, org_id: int | None) -> Claim | None:
        with transaction(self.connection):
            # A claim that a crash of the server forgets leaves its rows due: no need to wait.
            self.connection.execute("SET LOCAL synchronous_commit = off")
            self._execute("return_lost")
            self.connection.execute("TRUNCATE pg_temp.batch")
            types = [source.type for source in SOURCES]
            claimed = 0
            while claimed < size:
                taken = self._execute(
                    "claim", org_id=org_id, size=size - claimed, source_types=types
                ).rowcount
                if taken == 0:  # nothing is due, or somebody else is claiming it
                    break
                claimed += taken
            if claimed == 0:
                return None
            row = self._execute("remember_claim").fetchone()
            self.connection.execute("ANALYZE pg_temp.batch (id)")
        assert row is not None
        return Claim(row[0], claimed)

    def fail(self, source: Source, failures: list[Failure]) -> None:
        """Note which rows of the batch fail, and why."""
        if not failures:
            return
        self._execute(
            "note_failures",
            source_type=source.type,
            org_ids=[failure.org_id for failure in failures],
            source_ids=[failure.source_id for failure in failures],
            reasons=[failure.reason for failure in failures],
        )

    def finish(self, claim: Claim, *, of_sessions: bool) -> Finished:
        """Complete or fail rows of the batch that are still ours: those of sessions, or the others.

        Both are to be finished; then the claim is to be forgotten.
        """
        parameters = {"claimed_at": claim.claimed_at, "of_sessions": of_sessions}
        row = self._execute("finish", **parameters).fetchone()
        assert row is not None
        return Finished(*row)

    def forget(self, claim: Claim) -> None:
        """Nothing of the claim is left to do."""
        self._execute("forget_claim", claimed_at=claim.claimed_at)

    def release(self, claim: Claim) -> None:
        """Give the rows back as if they had not been claimed."""
        with transaction(self.connection):
            self._execute("release", claimed_at=claim.claimed_at)
            self._execute("forget_claim", claimed_at=claim.claimed_at)

    def _execute(self, name: str, **parameters: Any) -> Any:
        return self.connection.execute(
            sql.SQL(_SQL[name]),
            {"lock_key": self.lock_key, "max_attempts": self.max_attempts, **parameters},
        )


def purge(connection: Connection, age: timedelta) -> int:
    """Remove rows that were completed longer than `age` ago; how many."""
    removed = 0
    while True:
        batch = connection.execute(_SQL["purge"], {"age": age, "size": _PURGE_SIZE}).rowcount
        removed += batch
        if batch < _PURGE_SIZE:
            return removed
