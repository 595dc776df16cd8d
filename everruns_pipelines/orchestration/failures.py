"""What a run fails with: a sentence for the operator, and nothing of the data."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

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
RETRIES = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL)


@contextmanager
def told_plainly(rendered: Callable[[Refusal], Mapping[str, Any]]) -> Generator[None]:
    """Turn refusals and database errors into failures of the run that say what to do.

    Args:
        rendered: the form in which the API that the op stands for renders a refusal.

    Raises:
        dg.Failure: without retries for what would be repeated.
    """
    import psycopg

    try:
        yield
    except Refusal as refusal:
        raise dg.Failure(
            refusal.detail,
            metadata={"error": dg.MetadataValue.json(dict(rendered(refusal)))},
            allow_retries=refusal.code == "unavailable",
        ) from refusal
    except psycopg.Error as error:
        # The DETAIL and CONTEXT of a server's message quote rows. They are left out, and so is the
        # exception itself, whose text holds them.
        raise dg.Failure(
            f"PostgreSQL failed: {error.diag.message_primary or type(error).__name__}",
            metadata={"sqlstate": error.sqlstate or "none"},
            # Without a state the connection was lost.
            allow_retries=error.sqlstate is None or error.sqlstate.startswith(_FOR_A_WHILE),
        ) from None
