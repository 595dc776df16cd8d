"""What a role may do in PostgreSQL, asked before the first statement that needs it.

By column: the platform's tables hold more than we read (prompts, instructions, secrets), and a role
of ours need not be able to see it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal


@dataclass(frozen=True, order=True)
class Privilege:
    """A right on a table, or on one column of it.

    Args:
        table: as SQL names it, with its schema if need be.
        right: SELECT, INSERT, UPDATE or DELETE.
        column: None for the whole table.
    """

    table: str
    right: str
    column: str | None = None


def reading(tables: Mapping[str, Iterable[str]]) -> list[Privilege]:
    """What it takes to read the columns of some tables."""
    return on_columns("SELECT", tables)


def on_columns(right: str, tables: Mapping[str, Iterable[str]]) -> list[Privilege]:
    """One right on the columns of some tables."""
    return [Privilege(table, right, column) for table in tables for column in tables[table]]


def owning(tables: Iterable[str]) -> list[Privilege]:
    """What it takes to keep whole tables: to read them and to change their rows."""
    rights = ("SELECT", "INSERT", "UPDATE", "DELETE")
    return [Privilege(table, right) for table in tables for right in rights]


def require(connection: Connection, wanted: Iterable[Privilege]) -> None:
    """Refuse a role that lacks one of the privileges, or may make no temporary tables.

    Raises:
        Refusal: names every one that is missing.
    """
    lacking = _lacking_schemas(connection, wanted := sorted(wanted, key=_grouped))
    lacking += _lacking_rights(connection, wanted) if not lacking else []
    lacking += _lacking_temporary(connection)
    if lacking:
        raise Refusal(
            f"The database role lacks {'; '.join(lacking)}: deploy/postgres/roles.sql grants "
            "what is needed",
            code="permission_denied",
            status=503,
        )


def _grouped(privilege: Privilege) -> tuple[str, str, str]:
    return privilege.table, privilege.right, privilege.column or ""


def _lacking_schemas(connection: Connection, wanted: Iterable[Privilege]) -> list[str]:
    """Asked first: in a schema that is closed, the rest cannot even be looked up."""
    schemas = {one.table.partition(".")[0] for one in wanted if "." in one.table}
    rows = connection.execute(
        "SELECT nspname FROM pg_namespace WHERE nspname = ANY (%s)"
        " AND NOT has_schema_privilege(oid, 'USAGE') ORDER BY 1",
        [list(schemas)],
    )
    return [f"USAGE on schema {schema}" for (schema,) in rows]


def _lacking_rights(connection: Connection, wanted: Iterable[Privilege]) -> list[str]:
    """Such as `INSERT on fact_turn` and `SELECT (id, name) on agents`."""
    rows = connection.execute(
        "SELECT wanted.table_name, right_name, column_name"
        " FROM unnest(%s::text[], %s::text[], %s::text[]) WITH ORDINALITY"
        " AS wanted (table_name, right_name, column_name, place)"
        " LEFT JOIN pg_attribute ON attrelid = to_regclass(table_name) AND attname = column_name"
        # What is not there is another question.
        " WHERE to_regclass(table_name) IS NOT NULL AND NOT CASE"
        " WHEN column_name IS NULL THEN has_table_privilege(to_regclass(table_name), right_name)"
        " WHEN attnum IS NULL THEN true"
        " ELSE has_column_privilege(attrelid, attnum, right_name) END"
        " ORDER BY place",
        [
            [one.table for one in wanted],
            [one.right for one in wanted],
            [one.column for one in wanted],
        ],
    ).fetchall()
    lacking: list[str] = []
    for (table, right), found in groupby(rows, lambda row: row[:2]):
        columns = [column for _, _, column in found if column is not None]
        told = [right, f"({', '.join(columns)})", "on", table] if columns else [right, "on", table]
        lacking.append(" ".join(told))
    return lacking


def _lacking_temporary(connection: Connection) -> list[str]:
    """Selections, batches and days are temporary tables."""
    rows = connection.execute(
        "SELECT current_database()"
        " WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')"
    )
    return [f"TEMPORARY on database {name}" for (name,) in rows]
