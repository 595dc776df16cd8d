"""Connections to the PostgreSQL that holds the platform's tables."""

import os
import re
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Timer
from typing import TYPE_CHECKING, Any, LiteralString, TypeAlias, TypeVar

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
# In seconds. Nothing of ours holds a lock for as long without working, and nothing waits longer.
LOCK_SECONDS = 120
# What holds unless the URL, the role or the database says otherwise. A server frees what the
# process of a dead client held within two seconds, and what a machine held that has gone from the
# network within thirty.
_BOUNDS = {
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": "60s",
    "client_connection_check_interval": "2s",
    "tcp_user_timeout": "30s",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
_CONNECT_SECONDS = 10
_CANCEL_SECONDS = 3
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
    def connect(self, *, within: float | None = None) -> Generator[Connection]:
        """A connection in autocommit mode, closed at the end: group statements with `transaction`.

        A statement that is interrupted is cancelled.

        Args:
            within: seconds for connecting and for all that is asked; None for no bound.

        Raises:
            Refusal: the server cannot be reached, does not let us in, has not answered in time, or
                somebody has held a lock for too long.
        """
        with (
            _connected(self.url, self.variable, within) as connection,
            _told_who_holds_locks(connection),
        ):
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
def _connected(url: str, variable: str, within: float | None) -> Generator[Connection]:
    with (
        _opened(url, variable, within) as connection,
        _cancelled_when_left(connection),
        _cut_after(connection, within),
    ):
        if is_pooled(connection):
            refuse_shared_sessions(connection, lambda: _opened(url, variable, within))
        _set_session(connection, within)
        yield connection


def _opened(url: str, variable: str, within: float | None) -> Connection:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(url)
    connect_timeout = given.get("connect_timeout", _CONNECT_SECONDS)
    if within is not None:
        hosts = 1 + str(given.get("host", "")).count(",")
        connect_timeout = max(1, int(within / 2 / hosts))
    try:
        return psycopg.connect(
            url,
            autocommit=True,
            prepare_threshold=None,  # a plan kept for all values suits none of our selections
            connect_timeout=connect_timeout,
            application_name="everruns_pipelines",
            client_encoding="UTF8",
            # Of several hosts the primary, whichever it is just now. Reading takes it too: what is
            # read is staged in temporary tables, which a replica refuses.
            target_session_attrs=given.get("target_session_attrs", "read-write"),
            # A server that has gone from the network is noticed from our side, too.
            keepalives_idle=given.get("keepalives_idle", 15),
            keepalives_interval=given.get("keepalives_interval", 5),
            keepalives_count=given.get("keepalives_count", 3),
            tcp_user_timeout=given.get("tcp_user_timeout", 30_000),
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


def _set_session(connection: Connection, within: float | None) -> None:
    """Set what we rely on, and refuse a connection on which it does not hold."""
    from psycopg.types.json import Json

    relied_on = dict(_SESSION)
    if within is not None:
        # Sooner than the connection is cut: a server that is alive ends the statement itself.
        relied_on["statement_timeout"] = f"{round(800 * within)}ms"
    connection.execute(
        "SELECT set_config(key, value, false) FROM json_each_text(%s)"
        " UNION ALL"
        " SELECT set_config(key, value, false) FROM json_each_text(%s)"
        " JOIN pg_settings ON name = key AND source IN ('default', 'configuration file')",
        [Json(relied_on), Json(_BOUNDS)],
    )
    for name, expected in _TOLD.items():
        told = connection.info.parameter_status(name)
        if told is None or not told.startswith(expected):
            raise pooler_refused(f"it keeps {name} at {told}")


@contextmanager
def _cancelled_when_left(connection: Connection) -> Generator[None]:
    """Whoever leaves in the midst of a statement, as at an interrupt, ends it: the server would go
    on, and hold its locks.
    """
    import psycopg
    from psycopg.pq import TransactionStatus

    try:
        yield
    finally:
        if connection.info.transaction_status == TransactionStatus.ACTIVE:
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=_CANCEL_SECONDS)
            # Nobody reads its answer: nothing else can be asked, not even to commit.
            connection.close()


@contextmanager
def _cut_after(connection: Connection, seconds: float | None) -> Generator[None]:
    """Cut the connection when its time is over: a server that has frozen keeps no timeout."""
    if seconds is None:
        yield
        return
    import psycopg

    is_over = Event()
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        timer = Timer(seconds, _shut, [own, is_over])
        timer.daemon = True
        timer.start()
        try:
            yield
        except psycopg.OperationalError:
            if not is_over.is_set():
                raise
            raise Refusal(
                f"PostgreSQL has not answered within {seconds:g} s", code="unavailable", status=503
            ) from None
        finally:
            timer.cancel()


def _shut(connection: socket.socket, is_over: Event) -> None:
    is_over.set()  # first: whoever waits for an answer fails at once, and asks why
    with suppress(OSError):  # closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _told_who_holds_locks(connection: Connection) -> Generator[None]:
    from psycopg import errors

    try:
        yield
    except errors.LockNotAvailable as error:
        # Which row it is, the server does not say; in which table, it does.
        relation = re.search(r'relation "([^"]+)"', error.diag.context or "")
        what = f"A lock on table {relation[1]}" if relation else "A lock"
        holder = _holder(connection, _HOLDS_TABLE, [relation and relation[1]] * 2)
        raise _locked(what, holder, "the time allowed") from None


def wait_for_lock(
    connection: Connection, key: int, what: str, seconds: float = LOCK_SECONDS
) -> None:
    """Take an advisory lock, which is held until the transaction ends.

    Args:
        what: what holds it, for the message.
        seconds: how long to wait for it.

    Raises:
        Refusal: somebody has held it for all that time; says who.
    """
    from psycopg import errors

    set_timeout = "SELECT set_config('lock_timeout', %s, true)"
    usual = connection.execute("SELECT current_setting('lock_timeout')").fetchone()
    assert usual is not None
    try:
        with connection.transaction():
            # In milliseconds; 0 would wait for ever.
            connection.execute(set_timeout, [str(max(1, round(seconds * 1000)))])
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [key])
            connection.execute(set_timeout, usual)
    except errors.LockNotAvailable:
        holder = _holder(connection, _HOLDS_KEY, [key])
        raise _locked(f"{what}: the advisory lock {key:#x}", holder, f"{seconds:g} s") from None


_HOLDER = """
SELECT pid, application_name, coalesce(xact_start, backend_start)::timestamptz(0)::text
FROM pg_locks
JOIN pg_stat_activity USING (pid)
WHERE granted AND pid <> pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_HOLDS_KEY = (
    f"{_HOLDER} AND locktype = 'advisory' AND objsubid = 1"
    " AND (classid::bigint << 32) | objid::bigint = %s LIMIT 1"
)
# The one whose transaction has been open for longest: where many wait, it is what they wait for.
_HOLDS_TABLE = (
    f"{_HOLDER} AND locktype = 'relation' AND (relation = to_regclass(%s) OR %s::text IS NULL)"
    " ORDER BY 3 LIMIT 1"
)


def _holder(connection: Connection, query: LiteralString, parameters: list[Any]) -> str:
    row = connection.execute(query, parameters).fetchone()
    if row is None:
        return "somebody who has just let go of it"
    pid, application, since = row
    return f"the server's process {pid} ({application or 'unnamed'}, since {since or 'unknown'})"


def _locked(what: str, holder: str, seconds: str) -> Refusal:
    return Refusal(
        f"{what} is held by {holder}, and was not free within {seconds}. "
        "Try again when it is done, or end it with pg_terminate_backend",
        code="locked",
        status=409,
        allowed_actions=("retry",),
    )


@contextmanager
def transaction(
    connection: Connection, *, work_mem: str | None = None, one_snapshot: bool = False
) -> Generator[None]:
    """One transaction: all of it or nothing.

    Args:
        work_mem: memory for each sort or hash of this transaction, in PostgreSQL's units ("64MB").
        one_snapshot: all of its statements see the same state, unless it is part of another
            transaction.
    """
    from psycopg import sql
    from psycopg.pq import TransactionStatus

    is_outermost = connection.info.transaction_status == TransactionStatus.IDLE
    with connection.transaction():
        if one_snapshot and is_outermost:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        if work_mem is not None:
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
