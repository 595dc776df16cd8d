"""What a run fails with: a sentence for the operator, and nothing of the data."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import dagster as dg

from everruns_pipelines.errors import Refusal

# Classes of errors (SQLSTATE) that may have passed by the next try.
_FOR_A_WHILE = (
    "08",  # connection lost
    "40",  # deadlock, serialization
    "53",  # no space, no memory, too many connections
    "57",  # shut down, starting, cancelled
    "58",  # input or output failed
)
# For work that may be done again from the start: a database that restarts is back by then.
RETRIES = 3
PAUSE = 5  # seconds; nothing interrupts it


@contextmanager
def told_plainly(
    rendered: Callable[[Refusal], Mapping[str, Any]], *, retries: int = RETRIES
) -> Generator[None]:
    """Turn refusals and database errors into failures of the run that say what to do.

    Args:
        rendered: the form in which the API that the op stands for renders a refusal.
        retries: how often the op may be tried again.

    Raises:
        dg.Failure: the same would happen again.
        dg.RetryRequested: it may have passed by the next try.
    """
    import psycopg

    try:
        yield
    except Refusal as refusal:
        failure = dg.Failure(
            refusal.detail, metadata={"error": dg.MetadataValue.json(dict(rendered(refusal)))}
        )
        failure.__cause__ = refusal
        may_pass = refusal.code == "unavailable"
    except psycopg.Error as error:
        # The DETAIL and CONTEXT of a server's message quote rows. They are left out, and so is the
        # exception itself, whose text holds them.
        failure = dg.Failure(
            f"PostgreSQL failed: {error.diag.message_primary or type(error).__name__}",
            metadata={"sqlstate": error.sqlstate or "none"},
        )
        # Without a state the connection was lost.
        may_pass = error.sqlstate is None or error.sqlstate.startswith(_FOR_A_WHILE)
    else:
        return
    if may_pass and retries:
        try_again(failure, retries)
    raise failure from failure.__cause__


def try_again(failure: dg.Failure, retries: int = RETRIES) -> NoReturn:
    """End this attempt of the op; the failure is told once no retries are left.

    A RetryPolicy would do the same, and would also try an op again that somebody has terminated.

    Raises:
        dg.RetryRequested: always.
    """
    raise dg.RetryRequested(max_retries=retries, seconds_to_wait=PAUSE) from failure
