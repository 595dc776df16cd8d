"""Projectors that died, and the rows that are suspected of it.

As long as none dies, nothing is written about batches. A projector that died is known by the lock
that nobody holds any more. Whoever finds it names the rows of its own next batch, before it works
on them. If it dies too, these rows are suspects: tried in ever smaller parts, after all others,
until those that do no harm are acquitted, and a row that is alone whenever its projector dies is
parked. Other rows are never blamed.
"""

import secrets
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.reporting.outbox import Taken, take

# Of projectors that were working on one row, and on nothing else, until it is parked.
MOST_DEATHS = 3

_SQL = read_statements("everruns_pipelines.reporting", "deaths.sql")


@dataclass
class Deaths:
    """What one projector knows of the deaths of others.

    Attributes:
        is_cautious: a projector died, and it is not known what it was working on.
        part: the suspects that this one is trying.
    """

    connection: Connection
    lock_key: int
    is_cautious: bool = False
    part: int | None = None

    @classmethod
    @contextmanager
    def watched(cls, connection: Connection) -> Generator["Deaths"]:
        """Let the death of this projector show.

        A statement that ran into a timeout is a death, too: what it was working on may never end.
        """
        deaths = cls(connection, _number())
        connection.execute("SELECT pg_advisory_lock(%s)", [deaths.lock_key])
        deaths._execute("register")
        try:
            yield deaths
        except psycopg.errors.QueryCanceled:
            raise
        except BaseException:
            deaths._end()
            raise
        else:
            deaths._end()
        finally:
            if connection.info.transaction_status == TransactionStatus.IDLE:
                connection.execute("SELECT pg_advisory_unlock(%s)", [deaths.lock_key])

    def bury(self) -> int:
        """Look for projectors that died; how many rows are parked for it."""
        parked = 0
        with transaction(self.connection):
            for (part,) in self._execute("bury").fetchall():
                if part is None:
                    self.is_cautious = True
                elif self._execute("split", part=part, new_part=_number()).rowcount == 0:
                    parked += self._execute("convict", part=part, most=MOST_DEATHS).rowcount
            self._execute("forget")
        return parked

    def name_batch(self) -> None:
        """Make suspects of the batch that was taken, and a part that this projector tries."""
        self.part = _number()
        self._execute("name_batch", part=self.part)
        self._execute("try_part", part=self.part)

    def choose_part(self, cutoff: datetime, org_id: int | None) -> None:
        """Try a part that nobody tries, some of which was due at the cutoff, if there is one."""
        row = self._execute("choose_part", cutoff=cutoff, org_id=org_id).fetchone()
        if row is None:
            return
        try:
            self._execute("try_part", part=row[0])
        except psycopg.errors.UniqueViolation:
            return  # another projector was faster
        self.part = row[0]

    def take_part(self, size: int, cutoff: datetime, org_id: int | None) -> Taken:
        """Take up to `size` rows of the part; see `Outbox.take`."""
        return take(
            self.connection,
            _SQL["due_of_part"],
            taken=0,
            part=self.part,
            size=size,
            cutoff=cutoff,
            org_id=org_id,
        )

    def acquit(self) -> None:
        """The rows of the batch did no harm, if only this transaction is committed."""
        self._execute("acquit")
        self._execute("try_part", part=None)

    def _end(self) -> None:
        if self.connection.info.transaction_status == TransactionStatus.IDLE:
            self._execute("unregister")

    def _execute(self, name: str, **parameters: Any) -> Any:
        return self.connection.execute(_SQL[name], {"lock_key": self.lock_key, **parameters})


def _number() -> int:
    """One that nobody else has, and that an advisory lock may have."""
    return secrets.randbits(62)
