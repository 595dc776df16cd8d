"""Applies projections to a selection of sources: writes what differs, and tells what it did.

Everything happens in the caller's transaction.

There are three ways to write facts, each dearer than the one before. New ones are inserted, and
that is all. Where some may stand already, what stands is compared, and what differs is written.
Where others write new facts of the same sources at the same time, each is written as if it stood.
The first two end where a fact stands that was not expected: then the next one is tried.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg.raw_cursor import RawCursor
from psycopg.types.numeric import Int4

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.reporting.catalog import FACTS, SESSION, Fact, Projection, Source
from everruns_pipelines.reporting.selection import Facts, Failure, leave_out
from everruns_pipelines.reporting.statements import Projections, trying, writing

# Sessions can lose rows. Whoever projects them reads them only after the one before has committed:
# else an older state of a session could bring back what a newer one has removed.
_SESSIONS_LOCK = 0x6576_7270_7365_7373

# What a row can do to its own statement: bad values (22), violated constraints (23), an index entry
# that is too large (54). Everything else concerns the server, not the row.
_ROW_ERRORS = ("22", "23", "54")


@dataclass
class Outcome:
    """What a projection did: per fact table and UTC day, counts under the names in `COUNTS`.

    Days are text, as PostgreSQL writes them: it knows days that Python's calendar lacks.
    """

    counts: dict[tuple[str, str], Counter[str]] = field(
        default_factory=dict[tuple[str, str], Counter[str]]
    )
    failures: list[Failure] = field(default_factory=list[Failure])

    def add(self, other: "Outcome") -> None:
        """Take in what another part of the selection did."""
        for key, counts in other.counts.items():
            self.counts.setdefault(key, Counter()).update(counts)
        self.failures += other.failures


COUNTS = ("read", "inserted", "refreshed", "unchanged", "removed", "rejected")


def projections_of(source: Source, facts: Sequence[Fact] = FACTS) -> Projections:
    """The projections that read `source` and write one of `facts`."""
    return tuple(
        (fact, projection)
        for fact in facts
        for projection in fact.projections
        if projection.source is source
    )


def lock_sessions(connection: Connection) -> None:
    """Wait for whoever projects sessions, and let nobody else until the transaction ends."""
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_SESSIONS_LOCK])


def try_lock_sessions(connection: Connection) -> bool:
    """Let nobody else project sessions until the transaction ends, unless somebody is at it."""
    row = connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_SESSIONS_LOCK]).fetchone()
    return row == (True,)


def project_selection(
    connection: Connection,
    projections: Projections,
    first: int,
    last: int,
    *,
    facts: Facts = Facts.KNOWN,
) -> Outcome:
    """Project the sources numbered `first` to `last` of the selection, each wholly or not at all.

    Sources whose facts cannot be stored are among the failures; their neighbours are written.

    Args:
        facts: which of their facts may stand already.
    """
    if first > last or not projections:
        return Outcome()
    if projections[0][1].source is SESSION:
        lock_sessions(connection)
    try:
        with connection.transaction() as savepoint:
            outcome = _project(connection, projections, first, last, facts)
            if outcome.failures:
                raise psycopg.Rollback(savepoint)
    except psycopg.Error as error:
        if _is_unexpected(error, facts):
            return project_selection(connection, projections, first, last, facts=Facts(facts + 1))
        if not (error.sqlstate or "").startswith(_ROW_ERRORS):
            raise
        table = error.diag.table_name
        found = _once(
            failure
            for fact, projection in projections
            if table in (None, fact.table)
            for failure in _found_singly(connection, fact, projection, first, last)
        )
        if not found and first < last:
            # It is not the writing that fails, but what is to be written cannot be told.
            middle = (first + last) // 2
            outcome = project_selection(connection, projections, first, middle, facts=facts)
            outcome.add(project_selection(connection, projections, middle + 1, last, facts=facts))
            return outcome
        outcome = Outcome(failures=found or _failed(connection, first, error))
    if not outcome.failures:
        return outcome
    failures = _once(outcome.failures)
    leave_out(connection, failures, first, last)
    remaining = project_selection(connection, projections, first, last, facts=facts)
    remaining.failures += failures
    return remaining


def _once(failures: Iterable[Failure]) -> list[Failure]:
    """One for each source: several facts of it may fail."""
    return list({(failure.org_id, failure.source_id): failure for failure in failures}.values())


def _is_unexpected(error: psycopg.Error, facts: Facts) -> bool:
    """It may be that more stands than was expected, or more is to be stored than was checked."""
    if isinstance(error, psycopg.errors.UniqueViolation):
        return facts is not Facts.CONTESTED
    return isinstance(error, psycopg.errors.NumericValueOutOfRange) and facts is Facts.NEW


def _failed(connection: Connection, part: int, error: psycopg.Error) -> list[Failure]:
    rows = connection.execute(
        "SELECT org_id, source_id::text FROM pg_temp.selection WHERE part = %s", [part]
    )
    about = error.diag.constraint_name or error.diag.column_name
    return [
        Failure(org_id, source_id, _reason(error.sqlstate or "", about))
        for org_id, source_id in rows
    ]


def _found_singly(
    connection: Connection, fact: Fact, projection: Projection, first: int, last: int
) -> list[Failure]:
    """Which sources have rows of one fact that cannot be stored: each row is tried, none stays.

    Without a source being projected twice: the rows are made once, and tried on the server.
    """
    make, try_singly = trying(fact, projection)
    try:
        with connection.transaction() as savepoint:
            connection.execute(make, {"first": first, "last": last})
            connection.execute(try_singly)
            failed = connection.execute(
                "SELECT DISTINCT ON (org_id, split_part(source_key, ':', 2))"
                " org_id, split_part(source_key, ':', 2), failed_state, failed_name"
                " FROM pg_temp.tried WHERE failed_state IS NOT NULL"
            ).fetchall()
            raise psycopg.Rollback(savepoint)
    except psycopg.Error as error:
        if not (error.sqlstate or "").startswith(_ROW_ERRORS):
            raise
        return []
    return [Failure(org_id, id_, _reason(state, name)) for org_id, id_, state, name in failed]


def _reason(sqlstate: str, about: str | None) -> str:
    """What failed. The primary message of these errors can quote the value; its name cannot."""
    name = psycopg.errors.lookup(sqlstate).__name__
    return f"{name}: {about}" if about else name


def _project(
    connection: Connection, projections: Projections, first: int, last: int, facts: Facts
) -> Outcome:
    """Write a part of the selection.

    A row that somebody else wrote since we compared it is left alone and compared again: so an
    older state of a source never overwrites a newer one, and no update is lost.
    """
    statement = writing(projections, facts)
    written: dict[tuple[str, str], Counter[str]] = {}
    while True:
        outcome = Outcome()
        contested = 0
        # Prepared where the connection allows it: planning takes as long as projecting 100 rows.
        rows = RawCursor(connection).execute(statement, [Int4(first), Int4(last)], prepare=True)
        for row in rows:
            table, day, read, inserted, refreshed, removed, rejected, wanted, unstorable = row
            contested += wanted - inserted - refreshed
            written.setdefault((table, day), Counter()).update(
                inserted=inserted, refreshed=refreshed, removed=removed
            )
            failures = [Failure(*failure) for failure in unstorable or ()]
            outcome.failures += failures
            outcome.counts.setdefault((table, day), Counter()).update(
                read=read, rejected=rejected, unchanged=read - rejected - len(failures)
            )
        if not contested:
            for key, counts in written.items():
                outcome.counts.setdefault(key, Counter()).update(counts)
                outcome.counts[key]["unchanged"] -= counts["inserted"] + counts["refreshed"]
            return outcome
