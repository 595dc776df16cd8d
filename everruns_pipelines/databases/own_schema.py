"""What is ours in the user's database: the schema `everruns_pipelines`, from idempotent scripts."""

from hashlib import sha256
from typing import LiteralString

from psycopg import errors, sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.errors import Refusal


def ensure(connection: Connection, table: LiteralString, script: LiteralString) -> None:
    """Run `script`, which makes `table` and what goes with it, unless it has been run as it is.

    Raises:
        Refusal: it is to be run, and the role may not, or may not see what it made.
    """
    version = sha256(script.encode()).hexdigest()[:16]
    try:
        found = connection.execute(
            "SELECT obj_description(to_regclass(%s), 'pg_class')", [table]
        ).fetchone()
        if found == (version,):
            return
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
            f"{table} is missing, outdated or closed to this role, which may not make it: "
            "run `everruns-pipelines init` as a role that may",
            code="permission_denied",
            status=503,
            allowed_actions=("everruns-pipelines init",),
        ) from None
