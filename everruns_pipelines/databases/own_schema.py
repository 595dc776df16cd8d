"""What is ours in the user's database: the schema `everruns_pipelines`, from idempotent scripts."""

from hashlib import sha256
from typing import LiteralString

from psycopg import errors, sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.errors import Refusal


def ensure(connection: Connection, table: LiteralString, script: LiteralString) -> None:
    """Run `script`, which makes `table` and what goes with it, unless it has been run as it is.

    Raises:
        Refusal: it is to be run, and the role may not; or it has been run, and the role was not
            granted what it made.
    """
    version = sha256(script.encode()).hexdigest()[:16]
    # By the catalog, which shows what is there to those who may not use it, too.
    found = connection.execute(
        "SELECT obj_description(pg_class.oid, 'pg_class'),"
        " has_schema_privilege(pg_namespace.oid, 'USAGE'), quote_ident(current_user)"
        " FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
        " WHERE nspname || '.' || relname = %s",
        [table],
    ).fetchone()
    if found is not None and found[0] == version:
        _, may_use, role = found
        if not may_use:
            raise Refusal(
                f"{table} is there, but closed to this role. Its owner opens it by: "
                f"GRANT USAGE ON SCHEMA everruns_pipelines TO {role}; GRANT SELECT, INSERT, "
                f"UPDATE, DELETE ON ALL TABLES IN SCHEMA everruns_pipelines TO {role}",
                code="permission_denied",
                status=503,
            )
        return
    try:
        with transaction(connection):
            # Two first runs at once: CREATE ... IF NOT EXISTS is not safe against itself.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext('everruns_pipelines'))")
            # IF NOT EXISTS would ask for the right to make schemas, though it is there.
            made = connection.execute("SELECT to_regnamespace('everruns_pipelines')").fetchone()
            if made == (None,):
                connection.execute("CREATE SCHEMA everruns_pipelines")
            connection.execute(sql.SQL(script))
            connection.execute(
                sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.SQL(table), sql.Literal(version))
            )
    except errors.InsufficientPrivilege:
        raise Refusal(
            f"{table} is missing or outdated, and this role may not make it: "
            "run `everruns-pipelines init` as a role that may",
            code="permission_denied",
            status=503,
            allowed_actions=("everruns-pipelines init",),
        ) from None
