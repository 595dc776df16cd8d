"""What is due in the outbox, told by one query whose cost does not grow with the queue."""

from dataclasses import dataclass
from datetime import datetime

from everruns_pipelines.databases.postgres import Connection

# Counting stops here: that there is plenty to do is all that is asked.
MOST_COUNTED = 1000


@dataclass(frozen=True)
class Due:
    """What waits for a projector now. Counts stop at `MOST_COUNTED`.

    Args:
        pending: rows that were enqueued.
        failed: rows whose pause after a failure is over.
        lost: rows whose projector has not been heard of for 15 minutes.
        oldest: since when the oldest of the first two is due.
        next_retry: when the next failed row will be due; None if none will.
    """

    pending: int
    failed: int
    lost: int
    oldest: datetime | None
    next_retry: datetime | None

    @property
    def anything(self) -> bool:
        """A projector would find work."""
        return bool(self.pending or self.failed or self.lost)


def find_due(connection: Connection) -> Due:
    """What is due now.

    Raises:
        psycopg.Error: the outbox cannot be read.
    """
    row = connection.execute(_DUE, {"most": MOST_COUNTED}).fetchone()
    assert row is not None
    return Due(*row)


# Every part is a scan of the index on status and next_attempt_at that ends early. Times that
# Python's calendar lacks, infinity among them, are told as the nearest that is worth telling.
_DUE = """
SELECT
    (
        SELECT count(*) FROM (
            SELECT FROM reporting_outbox
            WHERE status = 'pending' AND next_attempt_at <= now()
            LIMIT %(most)s
        ) AS pending
    ),
    (
        SELECT count(*) FROM (
            SELECT FROM reporting_outbox
            WHERE status = 'failed' AND next_attempt_at <= now()
            LIMIT %(most)s
        ) AS failed
    ),
    (
        SELECT count(*) FROM (
            SELECT coalesce(claimed_at, updated_at) AS claimed_at FROM reporting_outbox
            WHERE status = 'processing'
            ORDER BY next_attempt_at
            LIMIT %(most)s
        ) AS processing
        WHERE claimed_at < now() - interval '15 minutes'
    ),
    (
        SELECT min(greatest(oldest, 'epoch')) FROM (
            (
                SELECT next_attempt_at AS oldest FROM reporting_outbox
                WHERE status = 'pending' AND next_attempt_at <= now()
                ORDER BY next_attempt_at
                LIMIT 1
            )
            UNION ALL
            (
                SELECT next_attempt_at FROM reporting_outbox
                WHERE status = 'failed' AND next_attempt_at <= now()
                ORDER BY next_attempt_at
                LIMIT 1
            )
        ) AS due
    ),
    (
        SELECT least(next_attempt_at, '9999-12-31Z') FROM reporting_outbox
        WHERE status = 'failed' AND next_attempt_at > now() AND next_attempt_at < 'infinity'
        ORDER BY next_attempt_at
        LIMIT 1
    )
"""
