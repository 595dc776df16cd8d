"""Right days: the days of a range whose facts are exactly those that their sources make.

All are compared in one pass over sources and facts: of each day the xor of the hashes of all rows
that must be there and of all that are there is 0 if, and but for a chance of 2^-64 only if, they
are the same.
"""

from dataclasses import dataclass
from datetime import date, timedelta

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.reporting.catalog import Column, Fact, Projection
from everruns_pipelines.reporting.query import BETWEEN, projected_rows

WORK_MEM = "64MB"


@dataclass(frozen=True)
class RightDay:
    """A day whose facts are those that its sources make.

    Args:
        read: rows that its sources make.
        rejected: of those, rows that are not stored.
        is_noted: what is to be said of its rows stands among the rejections.
    """

    read: int
    rejected: int
    is_noted: bool


def right_days(connection: Connection, fact: Fact, first: date, last: date) -> dict[date, RightDay]:
    """The days whose facts are exactly those that their sources make."""
    query = sql.SQL(_DAYS).format(
        rows=sql.SQL(" UNION ALL ").join(
            [*(_hashed_rows(fact, part) for part in fact.projections), _hashed_facts(fact)]
        )
    )
    with transaction(connection, work_mem=WORK_MEM):
        rows = connection.execute(query, {"first": first, "last": last}).fetchall()
    found = {
        day: RightDay(read, rejected, noted) for day, same, read, rejected, noted in rows if same
    }
    differing = {day for day, same, *_ in rows if not same}
    nothing = RightDay(0, 0, is_noted=True)
    return {
        day: found.get(day, nothing) for day in days_between(first, last) if day not in differing
    }


def days_between(first: date, last: date) -> list[date]:
    """The days from `first` to `last`, both included."""
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]


def _hashed_rows(fact: Fact, projection: Projection) -> sql.Composed:
    """The rows that the sources of the days make, each as (day, hash, is_read, ...)."""
    notes = projection.rejects or projection.reports
    return sql.SQL(_NOTED_ROWS if notes else _PROJECTED_ROWS).format(
        hash=_hash(fact, "projected"),
        projected=projected_rows(fact, projection, BETWEEN, by_id=True),
        name=sql.Literal(fact.table),
    )


def _hashed_facts(fact: Fact) -> sql.Composed:
    return sql.SQL(_STORED_ROWS).format(hash=_hash(fact, "fact"), fact=sql.Identifier(fact.table))


def _hash(fact: Fact, relation: str) -> sql.Composed:
    """The hash of a whole row, the same on both sides: values of one type each."""
    return sql.SQL("hash_record_extended(ROW ({}), 0)").format(
        sql.SQL(", ").join(_as_stored(column, relation) for column in fact.columns)
    )


def _as_stored(column: Column, relation: str) -> sql.Composed:
    """The value in the column's type; NULL, as no number is stored, if it does not fit."""
    value = sql.Identifier(relation, column.name)
    if column.type != "bigint" or relation == "fact":
        return sql.SQL("{}::{}").format(value, sql.SQL(column.type))
    return sql.SQL("CASE WHEN {0} BETWEEN {1} AND {2} THEN {0}::bigint END").format(
        value, sql.Literal(-(2**63)), sql.Literal(2**63 - 1)
    )


_DAYS = """
SELECT
    day,
    bit_xor(hash) = 0 AS is_right,
    coalesce(sum(is_read), 0)::bigint AS read,
    coalesce(sum(is_rejected), 0)::bigint AS rejected,
    bool_and(is_noted) AS is_noted
FROM ({rows}) AS rows (day, hash, is_read, is_rejected, is_noted)
GROUP BY day
"""

_PROJECTED_ROWS = """
SELECT time_bucket_day, {hash}, 1, 0, true
FROM ({projected}) AS projected
"""

_NOTED_ROWS = """
SELECT
    time_bucket_day,
    CASE WHEN rejected IS NULL THEN {hash} ELSE 0 END,
    1,
    (rejected IS NOT NULL)::integer,
    known.reason IS NOT DISTINCT FROM coalesce(rejected, reported)
        AND coalesce(known.written = (rejected IS NULL), true)
FROM ({projected}) AS projected
LEFT JOIN everruns_pipelines.fact_rejections AS known
    ON known.fact = {name}
    AND known.org_id = projected.org_id
    AND known.source_key = projected.source_key
"""

_STORED_ROWS = """
SELECT time_bucket_day, {hash}, 0, 0, true
FROM {fact} AS fact
WHERE time_bucket_day BETWEEN %(first)s AND %(last)s
"""
