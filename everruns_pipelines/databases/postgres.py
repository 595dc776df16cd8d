"""Connections to the PostgreSQL that holds the platform's tables."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pydantic import SecretStr

from everruns_pipelines.databases.poolers import (
    is_pooled,
    pooler_refused,
    refuse_shared_sessions,
)
from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

_T = TypeVar("_T")

# A name, not the type: loading the definitions loads no driver.
Connection: TypeAlias = "psycopg.Connection[TupleRow]"

# What our statements and psycopg rely on, whatever the server's, the database's or the role's
# defaults. Set by statement: a pooler drops the options of a connection, or refuses them. JIT
# compiles for a second what runs in a tenth.
_SESSION = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "default_transaction_isolation": "read committed",
    "jit": "off",
}
# What the driver must have been told of them: it reads times and texts by it.
_TOLD = {"TimeZone": "UTC", "DateStyle": "ISO", "client_encoding": "UTF8"}
_TRIES = 5


@dataclass(frozen=True)
class PostgresDatabase:
    """The configured PostgreSQL, else the embedded one, which is started on first use."""

    settings: Settings

    @property
    def variable(self) -> str:
        """The environment variable that names this database."""
        return "EVERRUNS_POSTGRES_URL"

    @property
    def configured(self) -> SecretStr | None:
        """Its URL, if one is configured."""
        return self.settings.postgres_url

    @contextmanager
    def connect(self) -> Generator[Connection]:
        """A connection in autocommit mode, closed at the end: group statements with `transaction`.

        Raises:
            Refusal: the server cannot be reached or does not let us in.
        """
        with _connected(self.url, self.variable) as connection:
            yield connection

    @property
    def url(self) -> str:
        """The connection URL. Holds a password: never to be printed."""
        if self.configured is not None:
            return self.configured.get_secret_value()
        from everruns_pipelines.databases.embedded.servers import embedded_postgres_url

        return embedded_postgres_url(self.settings.home)


class ItemsPostgresDatabase(PostgresDatabase):
    """The PostgreSQL with the items' tables: the same one, unless items have one of their own."""

    @property
    def variable(self) -> str:
        """The environment variable that names this database."""
        own = self.settings.items_postgres_url is not None
        return "EVERRUNS_ITEMS_POSTGRES_URL" if own else super().variable

    @property
    def configured(self) -> SecretStr | None:
        """Its URL, if one is configured."""
        return self.settings.items_postgres_url or super().configured


@contextmanager
def _connected(url: str, variable: str) -> Generator[Connection]:
    with _opened(url, variable) as connection:
        if is_pooled(connection):
            refuse_shared_sessions(connection, lambda: _opened(url, variable))
        _set_session(connection)
        yield connection


def _opened(url: str, variable: str) -> Connection:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(url)
    try:
        return psycopg.connect(
            url,
            autocommit=True,
            prepare_threshold=None,  # a plan kept for all values suits none of our selections
            connect_timeout=given.get("connect_timeout", 10),
            application_name="everruns_pipelines",
            client_encoding="UTF8",
            # Of several hosts the primary, whichever it is just now. Reading takes it too: what is
            # read is staged in temporary tables, which a replica refuses.
            target_session_attrs=given.get("target_session_attrs", "read-write"),
        )
    except psycopg.OperationalError as error:
        # libpq names host and user, never the password. Its hints, in lines of their own, are left
        # out.
        told = " ".join(line for line in str(error).splitlines() if not line.startswith("\t"))
        raise Refusal(
            f"PostgreSQL cannot be used: {told}. "
            f"{variable} must name a running primary and an existing database",
            code="unavailable",
            status=503,
        ) from None


def _set_session(connection: Connection) -> None:
    """Set what we rely on, and refuse a connection on which it does not hold."""
    from psycopg.types.json import Json

    connection.execute(
        "SELECT set_config(key, value, false) FROM json_each_text(%s)", [Json(_SESSION)]
    )
    for name, expected in _TOLD.items():
        told = connection.info.parameter_status(name)
        if told is None or not told.startswith(expected):
            raise pooler_refused(f"it keeps {name} at {told}")


@contextmanager
def transaction(connection: Connection, *, work_mem: str | None = None) -> Generator[None]:
    """One transaction: all of it or nothing.

    Args:
        work_mem: memory for each sort or hash of this transaction, in PostgreSQL's units ("64MB").
    """
    with connection.transaction():
        if work_mem is not None:
            from psycopg import sql

            setting: Any = sql.SQL("SET LOCAL work_mem = {}").format(sql.Literal(work_mem))
            connection.execute(setting)
        yield


def tried_again(work: Callable[[], _T]) -> _T:
    """Do `work`, one transaction, and again if it loses a race against another transaction.

    Raises:
        psycopg.Error: it lost every time, or failed otherwise.
    """
    from psycopg import errors

    for _ in range(_TRIES - 1):
        try:
            return work()
        except (errors.DeadlockDetected, errors.SerializationFailure):
            continue
    return work()
