"""What is ours in the user's database: the schema `everruns_pipelines`, from idempotent scripts.

Each part's script has a version, a number. Old and new code run beside each other while a release
is rolled out: code works on its own version, and on newer ones that say that they allow it.
"""

import re
from dataclasses import dataclass
from typing import LiteralString

from psycopg import errors, sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.errors import Refusal

_NOTED = re.compile(r"version (\d+), usable by code of version (\d+) or newer")
# The release that noted no version.
_FIRST = 1


@dataclass(frozen=True)
class OwnSchema:
    """What one part keeps of its own.

    Args:
        package: the one with `schema.sql`, which may be run over any older version.
        table: the first that the script makes.
        version: of the script. It grows with every change of it.
        usable_from: the oldest version whose code may work on this one. It grows when old code
            would do harm.
    """

    package: str
    table: LiteralString
    version: int
    usable_from: int

    def ensure(self, connection: Connection) -> None:
        """Run the script, unless what it makes is there in this version or a newer one.

        Raises:
            Refusal: it is to be run, and the role may not; or it is there, and is closed to the
                role or must not be used by this release.
        """
        if not self._is_there(connection):
            self._make(connection)

    def check(self, connection: Connection) -> None:
        """Check that it is there as this release needs it; writes nothing.

        Raises:
            Refusal: it is missing, older, closed to the role, or not to be used by this release.
        """
        if not self._is_there(connection):
            raise self._lacking(connection)

    def _is_there(self, connection: Connection) -> bool:
        found = _look(connection, self.table)
        if found is None or found.version < self.version:
            return False
        if found.usable_from > self.version:
            raise Refusal(
                f"{self.table} was made by a newer release: its version {found.version} must not "
                f"be used by code of version {self.version}. Replace this process by the newer "
                "release",
                code="incompatible_schema",
                status=503,
            )
        if not found.is_open:
            raise Refusal(
                f"{self.table} is there, but closed to this role. Its owner opens it by: "
                f"GRANT USAGE ON SCHEMA everruns_pipelines TO {found.role}; GRANT SELECT, INSERT, "
                f"UPDATE, DELETE ON ALL TABLES IN SCHEMA everruns_pipelines TO {found.role}",
                code="permission_denied",
                status=503,
            )
        return True

    def _make(self, connection: Connection) -> None:
        try:
            with transaction(connection):
                # Two first runs at once: CREATE ... IF NOT EXISTS is not safe against itself. Who
                # comes second finds it made, perhaps by a newer release.
                connection.execute("SELECT pg_advisory_xact_lock(hashtext('everruns_pipelines'))")
                if self._is_there(connection):
                    return
                # IF NOT EXISTS would ask for the right to make schemas, though it is there.
                made = connection.execute("SELECT to_regnamespace('everruns_pipelines')").fetchone()
                if made == (None,):
                    connection.execute("CREATE SCHEMA everruns_pipelines")
                connection.execute(sql.SQL(read_sql(self.package, "schema.sql")))
                connection.execute(
                    sql.SQL("COMMENT ON INDEX {} IS {}").format(
                        sql.SQL(_key(self.table)),
                        sql.Literal(
                            f"version {self.version}, "
                            f"usable by code of version {self.usable_from} or newer"
                        ),
                    )
                )
        except errors.InsufficientPrivilege:
            raise self._lacking(connection) from None

    def _lacking(self, connection: Connection) -> Refusal:
        found = _look(connection, self.table)
        if found is None:
            told = (
                f"{self.table} is missing: run `everruns-pipelines init` as a role that may make it"
            )
        else:
            told = (
                f"{self.table} is of version {found.version}, and this release needs version "
                f"{self.version}: run its `everruns-pipelines init` as its owner {found.owner}"
            )
        return Refusal(
            told,
            code="permission_denied",
            status=503,
            allowed_actions=("everruns-pipelines init",),
        )


@dataclass(frozen=True)
class _Found:
    version: int
    usable_from: int
    is_open: bool
    role: str
    owner: str


def _look(connection: Connection, table: LiteralString) -> _Found | None:
    """By the catalog, which shows what is there to those who may not use it, too."""
    schema, _, name = table.partition(".")
    row = connection.execute(
        "SELECT obj_description(own_key.oid, 'pg_class'),"
        " has_schema_privilege(pg_namespace.oid, 'USAGE'),"
        " quote_ident(current_user), quote_ident(pg_get_userbyid(own_table.relowner))"
        " FROM pg_namespace"
        " JOIN pg_class AS own_table"
        " ON own_table.relnamespace = pg_namespace.oid AND own_table.relname = %s"
        " LEFT JOIN pg_class AS own_key"
        " ON own_key.relnamespace = pg_namespace.oid AND own_key.relname = %s"
        " WHERE nspname = %s",
        [name, _key(name), schema],
    ).fetchone()
    if row is None:
        return None
    noted, is_open, role, owner = row
    versions = _NOTED.fullmatch(noted or "")
    version, usable_from = map(int, versions.groups()) if versions else (_FIRST, _FIRST)
    return _Found(version, usable_from, is_open, role, owner)


def _key(table: LiteralString) -> LiteralString:
    """Where the version is noted: not on the table itself, where release 0.1.0 keeps its own note,
    and refuses every other.
    """
    return f"{table}_pkey"
