"""The outbox: take, complete, fail, park, purge. The queue's rules and nothing else.

Its statements stand in `outbox.sql`, each under its name.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any, LiteralString

from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.reporting.catalog import SESSION, SOURCES
from everruns_pipelines.reporting.database import require_org
from everruns_pipelines.reporting.selection import Facts, Part, make_selection

_PURGE_SIZE = 10_000
_FORGET_AFTER = 10  # looks at the queue
# Of one batch: what some do not use of their share, others get. But not until it is full: where
# others hold most, a look finds little, and what is taken stays locked meanwhile.
_ROUNDS = 4

# A queue has no statistics that hold for longer than a minute, nor has a table that grows. With
# nothing but nested loops over indexes to choose from, a plan needs none, and can be kept.
_PLANNING = (
    "enable_seqscan",
    "enable_bitmapscan",
    "enable_hashjoin",
    "enable_mergejoin",
    "enable_sort",
)
_BY_KEY = sql.SQL("SET plan_cache_mode = force_generic_plan; {}").format(
    sql.SQL("; ").join(sql.SQL("SET {} = off").format(sql.Identifier(name)) for name in _PLANNING)
)
_AS_BEFORE = sql.SQL("; ").join(
    sql.SQL("RESET {}").format(sql.Identifier(name)) for name in ("plan_cache_mode", *_PLANNING)
)

_SQL = read_statements("everruns_pipelines.reporting", "outbox.sql")


@dataclass
class Taken:
    """What was taken: so many rows of the outbox, how many of them of sessions, which parts of the
    selection they are, and up to when pending ones of which organization were due.
    """

    rows: int = 0
    sessions: int = 0
    parts: list[Part] = field(default_factory=list[Part])
    reached: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, other: "Taken") -> None:
        """Take in what was taken besides."""
        self.rows += other.rows
        self.sessions += other.sessions
        self.parts += other.parts
        self.reached |= other.reached


class Reached:
    """Up to when the pending rows of each organization have been taken, by all who share this.

    Some that lie before may be due all the same: somebody let go of them. So it is forgotten now
    and then, and whenever nothing more is found.
    """

    def __init__(self) -> None:
        self._at: dict[str, str] = {}
        self._looks = 0

    def at(self) -> dict[str, str]:
        """By organization, when; for one look at the queue."""
        self._looks += 1
        if self._looks % _FORGET_AFTER == 0:
            self.forget()
        return dict(self._at)

    def add(self, at: dict[str, str]) -> None:
        """Take in how far a look has come."""
        self._at.update(at)

    def forget(self) -> None:
        """Begin at the beginning again."""
        self._at = {}


@dataclass(frozen=True)
class Finished:
    """How many rows of a batch ended how. Parked ones are among the failed."""

    completed: int
    failed: int
    parked: int


@dataclass(frozen=True)
class Outbox:
    """A projector's hold on the queue, for the life of its connection.

    What it takes, it holds by row locks until the transaction ends.
    """

    connection: Connection
    max_attempts: int
    org_id: int | None
    reached: Reached

    @classmethod
    @contextmanager
    def opened(
        cls,
        connection: Connection,
        max_attempts: int,
        org_id: int | None = None,
        reached: Reached | None = None,
    ) -> Generator["Outbox"]:
        """Ready to take rows of all organizations, or of one.

        Until the end, the connection looks everything up by key, and keeps its plans.
        """
        prepare_threshold = connection.prepare_threshold
        connection.prepare_threshold = 2**31  # what asks for it is prepared, and nothing else
        connection.execute(_BY_KEY)
        make_selection(connection)
        try:
            yield cls(connection, max_attempts, org_id, reached or Reached())
        finally:
            connection.prepare_threshold = prepare_threshold
            if connection.info.transaction_status == TransactionStatus.IDLE:
                connection.execute(_AS_BEFORE)

    def cutoff(self) -> datetime:
        """Now, by the database's clock, by which it is told what is due.

        What was left by foreign projectors that died is due again.
        """
        self._execute("return_stale")
        row = self.connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        return row[0]

    def take(self, size: int, cutoff: datetime) -> Taken:
        """Take up to `size` rows that were due at the cutoff, in equal shares per organization.

        Rows that others hold are passed over.
        """
        taken = Taken()
        for _ in range(_ROUNDS):
            if taken.rows == size:
                break
            reached = self.reached.at()
            found = take(
                self.connection,
                _SQL["due"],
                taken=taken.rows,
                org_id=self.org_id,
                size=size - taken.rows,
                cutoff=cutoff,
                reached=Jsonb(reached),
            )
            taken.add(found)
            if found.rows:
                self.reached.add(found.reached)
            elif reached:
                self.reached.forget()
            else:
                break
        return taken

    def leave_sessions(self) -> int:
        """Let go of the rows of sessions; how many there were."""
        return self._execute("leave").rowcount

    def finish(self, rows: int, *, of_sessions: bool) -> Finished:
        """Complete or fail what is held of sessions, or all else: so many rows."""
        completed = self._execute("complete", of_sessions=of_sessions).rowcount
        if completed == rows:
            return Finished(completed, 0, 0)
        row = self._execute(
            "fail", max_attempts=self.max_attempts, of_sessions=of_sessions
        ).fetchone()
        assert row is not None
        return Finished(completed, *row)

    def _execute(self, name: str, **parameters: Any) -> Any:
        return self.connection.execute(_SQL[name], parameters, prepare=True)


def take(connection: Connection, due: LiteralString, **parameters: Any) -> Taken:
    """Take what `due` finds and locks, a statement with those parameters, into the selection.

    Args:
        taken: how many rows it holds already.
    """
    types = [source.type for source in SOURCES]
    taken = Taken()
    for source_type, is_new, first, last, rows, reached in connection.execute(
        _taking(due), {"source_types": types, **parameters}, prepare=True
    ):
        taken.rows += rows
        taken.sessions += rows if source_type == SESSION.type else 0
        taken.reached = reached or {}
        if first is not None:
            facts = Facts.NEW if is_new else Facts.KNOWN
            taken.parts.append(Part(source_type, facts, first, last))
    return taken


@cache
def _taking(due: LiteralString) -> bytes:
    return sql.SQL(_SQL["take"]).format(due=sql.SQL(due)).as_bytes(None)


def check_source_type(source_type: str | None) -> None:
    """Refuse a source type that does not exist.

    Raises:
        Refusal: it does not.
    """
    allowed = ", ".join(source.type for source in SOURCES)
    if source_type is not None and source_type not in [source.type for source in SOURCES]:
        raise Refusal(
            f"source_type: expected one of {allowed}, got {source_type!r:.60}",
            errors=(FieldError(("source_type",), f"one of {allowed}"),),
        )


def unpark(
    connection: Connection, org_id: int | None, source_type: str | None, *, dry_run: bool
) -> dict[str, int]:
    """Make parked rows due for another attempt.

    Args:
        org_id: of one organization; None for all.
        source_type: of one source type; None for all.
        dry_run: count only.

    Returns:
        How many, in all (`unparked`) and by source.

    Raises:
        Refusal: there is no such organization or source type.
    """
    check_source_type(source_type)
    if org_id is not None:
        require_org(connection, org_id)
    found = connection.execute(
        _SQL["count_parked" if dry_run else "unpark"],
        {"org_id": org_id, "source_type": source_type},
    )
    counts: dict[str, int] = {str(name): int(count) for name, count in found}
    by_source = {source.counted_as: counts.get(source.type, 0) for source in SOURCES}
    return {"unparked": sum(counts.values())} | by_source


def purge(connection: Connection, age: timedelta) -> int:
    """Remove rows that were completed longer than `age` ago; how many."""
    removed = 0
    while True:
        batch = connection.execute(_SQL["purge"], {"age": age, "size": _PURGE_SIZE}).rowcount
        removed += batch
        if batch < _PURGE_SIZE:
            return removed
