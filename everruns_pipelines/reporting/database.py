"""What reporting needs of a database: checked before the first statement, never made for the user.

The platform's tables are the user's. What is our own stands in `schema.sql`, and is made on demand.
"""

from psycopg import sql

from everruns_pipelines.databases.own_schema import OwnSchema
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.privileges import Privilege, owning, reading, require
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS

_OLDEST_SERVER = 18

_OUTBOX = (
    "id org_id source_type source_id source_version reason status attempts next_attempt_at "
    "last_error claimed_at created_at updated_at"
)
_WRITTEN = ("reporting_outbox", *(fact.table for fact in FACTS))
OWN = OwnSchema(
    "everruns_pipelines.reporting", "everruns_pipelines.fact_rejections", version=2, usable_from=1
)
OWN_TABLES = (
    "everruns_pipelines.key_digests",
    "everruns_pipelines.archive_digest",
    "everruns_pipelines.fact_rejections",
    "everruns_pipelines.outbox_projectors",
    "everruns_pipelines.outbox_suspects",
)


def needed_columns() -> dict[str, list[str]]:
    """Every table of the platform that reporting touches, and the columns of it."""
    needed = {t: [column.name for column in columns] for t, columns in SOURCE_COLUMNS.items()}
    needed["organizations"] = ["org_id"]
    needed["reporting_outbox"] = list(_OUTBOX.split())
    for fact in FACTS:
        needed[fact.table] = [column.name for column in fact.columns] + ["projected_at"]
    return needed


def needed_privileges() -> list[Privilege]:
    """What a role needs on the platform's tables: facts and outbox whole, of the rest columns."""
    read = {table: names for table, names in needed_columns().items() if table not in _WRITTEN}
    return [*reading(read), *owning(_WRITTEN)]


def prepare(connection: Connection) -> None:
    """Check that the database is one that we can work on, and make what is ours.

    Raises:
        Refusal: it is not, or what is ours is missing and may not be made.
    """
    check_platform(connection)
    ensure_schema(connection)
    check_own_tables(connection)


def check_platform(connection: Connection) -> None:
    """Check that the database is one that we can work on; writes nothing.

    Raises:
        Refusal: it is too old, or lacks a table, a column or a privilege; names all that is
            missing.
    """
    check_tables(connection)
    require(connection, needed_privileges())


def check_own_tables(connection: Connection) -> None:
    """Raise a `Refusal` that names what the role lacks on the tables that are ours."""
    require(connection, owning(OWN_TABLES))


def check_tables(connection: Connection) -> None:
    """Check that the platform's tables are there, whoever may read them.

    Raises:
        Refusal: the server is too old, or lacks a table or a column; names all that is missing.
    """
    if connection.info.server_version < _OLDEST_SERVER * 10_000:
        raise Refusal(
            f"PostgreSQL {_OLDEST_SERVER} or newer is needed, this is "
            f"{connection.info.server_version // 10_000}",
            code="incompatible_schema",
            status=503,
        )
    missing = _missing_columns(connection)
    if set(missing) == {f"table {table}" for table in needed_columns()}:
        raise Refusal(
            "The database has no table of reporting: EVERRUNS_POSTGRES_URL must name the one that "
            "has them, or EVERRUNS_PARTS=items leaves reporting out",
            code="incompatible_schema",
            status=503,
        )
    _refuse_if(
        missing,
        "The database lacks {}: it must be the platform's, with all migrations applied",
        "incompatible_schema",
    )


def require_org(connection: Connection, org_id: int) -> None:
    """Refuse an organization that does not exist.

    Raises:
        Refusal: there is none of that number.
    """
    found = connection.execute("SELECT FROM organizations WHERE org_id = %s", [org_id])
    if found.fetchone() is None:
        raise Refusal(
            f"org_id: there is no organization {org_id}",
            code="not_found_error",
            status=404,
            errors=(FieldError(("org_id",), "an organization that exists"),),
        )


def ensure_schema(connection: Connection) -> None:
    """Make what reporting keeps of its own, if it is not there as this version wants it."""
    OWN.ensure(connection)


def has_event_index(connection: Connection) -> bool | None:
    """Are the events of a day found by index? None: there is none; False: its build was aborted."""
    row = connection.execute(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('events_ts_projected')"
    ).fetchone()
    return None if row is None else bool(row[0])


def create_indexes(connection: Connection) -> None:
    """Make the recommended index on the platform's table, without blocking its writers."""
    if has_event_index(connection) is False:
        connection.execute("DROP INDEX CONCURRENTLY events_ts_projected")
    connection.execute(sql.SQL(read_sql("everruns_pipelines.reporting", "indexes.sql")))


def _refuse_if(missing: list[str], message: str, code: str) -> None:
    if missing:
        raise Refusal(message.format(", ".join(missing)), code=code, status=503)


def _missing_columns(connection: Connection) -> list[str]:
    needed = needed_columns()
    present: dict[str, set[str]] = {
        table: set(columns or ())
        for table, columns in connection.execute(
            "SELECT wanted, (SELECT array_agg(attname::text) FROM pg_attribute"
            " WHERE attrelid = to_regclass(wanted) AND attnum > 0 AND NOT attisdropped)"
            " FROM unnest(%s::text[]) AS wanted",
            [list(needed)],
        )
    }
    missing: list[str] = []
    for table, columns in needed.items():
        if not present[table]:
            missing.append(f"table {table}")
        else:
            missing += [f"column {table}.{c}" for c in columns if c not in present[table]]
    return missing
