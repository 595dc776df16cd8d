"""Poolers between us and PostgreSQL, such as PgBouncer: which of them we can work through."""

from collections.abc import Callable
from contextlib import closing
from select import select
from typing import TYPE_CHECKING

from everruns_pipelines.errors import Refusal

if TYPE_CHECKING:
    from everruns_pipelines.databases.postgres import Connection

# How a pooler is looked at: so often, and so many seconds for it to find a free backend.
_LOOKS = 5
_PATIENCE = 2.0


def is_pooled(connection: "Connection") -> bool:
    """Whether somebody between us and the server invents backends."""
    return _backend(connection) != connection.info.backend_pid


def refuse_shared_sessions(
    connection: "Connection", open_another: Callable[[], "Connection"]
) -> None:
    """Refuse a pooler that gives the transactions of a session to whichever backend is free.

    There settings and temporary tables are lost, and locks stay behind. It shows: between two
    transactions of a session, either another session is given its backend, or it is given another.

    Raises:
        Refusal: it is such a pooler, or the URL has options that a pooler may drop.
    """
    if "options" in connection.info.get_parameters():
        raise pooler_refused(
            "it may drop the options of the URL: set them by ALTER ROLE ... SET instead"
        )
    # Closed, and no more: it may still wait, and then it can be asked nothing.
    with closing(open_another()) as other:
        for _ in range(_LOOKS):
            mine = _backend(connection)
            others = _backend_soon(other)
            if others == mine or _backend(connection) != mine:
                raise pooler_refused(
                    "its sessions share backends; each needs one of its own "
                    "(PgBouncer: pool_mode = session)"
                )
            if others is None:
                # The pool has no more of them: it does not give ours away, although we are idle.
                return


def pooler_refused(reason: str) -> Refusal:
    """What to raise about a pooler that we cannot work through."""
    return Refusal(
        f"PostgreSQL cannot be used through this pooler: {reason}",
        code="incompatible_schema",
        status=503,
    )


def _backend(connection: "Connection") -> int:
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


def _backend_soon(connection: "Connection") -> int | None:
    """None: it waits for a backend."""
    connection.pgconn.send_query(b"SELECT pg_backend_pid()")
    if not select([connection], [], [], _PATIENCE)[0]:
        return None
    result = connection.pgconn.get_result()
    value = None if result is None else result.get_value(0, 0)
    while connection.pgconn.get_result() is not None:
        pass  # until libpq says that the query is over
    return None if value is None else int(value)
