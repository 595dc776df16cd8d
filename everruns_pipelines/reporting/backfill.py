"""Enqueues the sources whose facts are missing or stale: exactly those, up to a limit that
source types share: they take turns, and of each the oldest go first.

What is missing is computed from the tables as they stand; nothing that was found right earlier is
taken for granted. See docs/backfill.md for why that is cheap.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from typing import cast

from everruns_pipelines.databases.postgres import (
    Connection,
    transaction,
    tried_again,
    wait_for_lock,
)
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.reporting.catalog import SOURCES, Source
from everruns_pipelines.reporting.database import require_org
from everruns_pipelines.reporting.missing import find_missing
from everruns_pipelines.reporting.reconcile import GRACE

# Held by the platform's own backfill and repair for as long as they run.
GLOBAL_LOCK = 0x6576_6572_7270_7471
# Longer than the server takes to notice that whoever held it has gone from the network.
LOCK_WAIT_SECONDS = 60
LARGEST_LIMIT = 10_000

_WORK_MEM = "256MB"
_SQL = read_statements("everruns_pipelines.reporting", "backfill.sql")


@dataclass(frozen=True)
class BackfillRequest:
    """What to enqueue.

    Args:
        limit: the most outbox rows to enqueue across all source types, from 1 to 10000.
        org_id: one organization; None for all of them.
        source_types: some of `event`, `session`, `llm_generation`, `usage_ledger`; None for all.
        dry_run: count what would be enqueued, and write nothing.
    """

    limit: int = 1000
    org_id: int | None = None
    source_types: Sequence[str] | None = None
    dry_run: bool = False

    @property
    def is_of_everything(self) -> bool:
        """Whether it looks at all sources of all organizations."""
        return self.org_id is None and self.source_types is None


@dataclass(frozen=True)
class Missing:
    """Sources of one type that lack a fact or have a stale one, and do not wait in the outbox.

    Args:
        sources: how many.
        damaged: of these, how many had their facts once, or should have had them for long. The
            others have changed just now, and nobody has enqueued them.
        oldest: since when the oldest has been so, at most: when it happened or last changed. None
            if there are none.
        days: the UTC days on which they happened: those of the facts that they lack.
    """

    sources: int = 0
    damaged: int = 0
    oldest: datetime | None = None
    days: Sequence[date] = ()


Found = Mapping[str, Missing]


def enqueue(
    connection: Connection,
    request: BackfillRequest,
    *,
    lock_wait_seconds: float = LOCK_WAIT_SECONDS,
    tell: Callable[[Found], None] = lambda _: None,
) -> dict[str, int]:
    """Enqueue what is missing or stale, the oldest sources first.

    Exactly min(limit, missing) rows are enqueued, except those that somebody else has meanwhile
    enqueued. What waits in the outbox already does not count as missing.

    Args:
        lock_wait_seconds: how long a backfill of all organizations waits for another one.
        tell: is told what was found, before it is enqueued.

    Returns:
        Rows enqueued: `enqueued` in all, and `events`, `llm_generations`, `sessions`,
        `usage_ledger`.

    Raises:
        Refusal: the request is not valid, its organization does not exist, or another backfill of
            all organizations has not ended in time.
    """
    check(connection, request)
    wanted = request.source_types
    sources = [source for source in SOURCES if wanted is None or source.type in wanted]
    enqueued: Counter[str] = Counter()
    while (open_limit := request.limit - enqueued.total()) > 0:
        found, written = tried_again(
            partial(_enqueue_once, connection, request, sources, open_limit, lock_wait_seconds)
        )
        tell(found)
        enqueued += written
        if written.total() == sum(missing.sources for missing in found.values()):
            break
        # Others have enqueued some of these first. Look again: there may be more.
    counts = {source.counted_as: enqueued[source.type] for source in SOURCES}
    return {"enqueued": enqueued.total(), **counts}


def look(
    connection: Connection, org_id: int | None = None, sources: Sequence[Source] = SOURCES
) -> dict[str, Missing]:
    """What a backfill without a limit would enqueue, by source type: exact, whatever its age.

    Enqueues nothing. Digests are kept, so that the next look is cheap: see docs/backfill.md.
    """
    with transaction(connection, work_mem=_WORK_MEM, one_snapshot=True):
        find_missing(connection, sources, org_id)
        return _choose(connection, None)


def _enqueue_once(
    connection: Connection,
    request: BackfillRequest,
    sources: Sequence[Source],
    limit: int,
    lock_wait_seconds: float,
) -> tuple[Found, Counter[str]]:
    """Choose what is missing, and enqueue it; what was chosen, and how many of each type are.

    Nobody is kept out while we search. What others have enqueued since, the platform's own backfill
    or another one of ours, is known by its outbox row: it is another one than our snapshot shows.
    """
    with transaction(connection, work_mem=_WORK_MEM, one_snapshot=True):
        find_missing(connection, sources, request.org_id, keep_digests=not request.dry_run)
        chosen = _choose(connection, limit)
    if request.dry_run:
        return chosen, Counter({type_: missing.sources for type_, missing in chosen.items()})
    with transaction(connection):
        if request.org_id is None:
            # Keeps the platform's own backfills out.
            what = "Another backfill or repair of all organizations is running"
            wait_for_lock(connection, GLOBAL_LOCK, what, lock_wait_seconds)
        return chosen, _write(connection)


def check(connection: "Connection | None", request: BackfillRequest) -> None:
    """Refuse what `enqueue` could not do.

    Args:
        connection: None where there is none: then the organization is not looked up.

    Raises:
        Refusal: a value is not allowed, or there is no such organization.
    """
    limit, org_id, source_types = request.limit, request.org_id, request.source_types
    if not _is_integer(limit) or not 1 <= limit <= LARGEST_LIMIT:
        raise _refused("limit", f"a whole number from 1 to {LARGEST_LIMIT}", limit)
    if source_types is not None:
        allowed = [source.type for source in SOURCES]
        expected = f"null for all, or a list of some of {', '.join(allowed)}"
        if not isinstance(cast("object", source_types), list | tuple) or not source_types:
            raise _refused("source_types", expected, source_types)
        for source_type in source_types:
            if source_type not in allowed:
                raise _refused("source_types", expected, source_type)
    if not isinstance(cast("object", request.dry_run), bool):
        raise _refused("dry_run", "true or false", request.dry_run)
    if org_id is None:
        return
    if not _is_integer(org_id):
        raise _refused("org_id", "null for all organizations, or the number of one", org_id)
    if connection is not None:
        require_org(connection, org_id)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(field: str, expected: str, value: object) -> Refusal:
    return Refusal(
        f"{field}: expected {expected}; got {repr(value)[:60]}",
        errors=(FieldError((field,), f"expected {expected}"),),
    )


def _choose(connection: Connection, limit: int | None) -> dict[str, Missing]:
    connection.execute("DROP TABLE IF EXISTS pg_temp.chosen")
    connection.execute(_SQL["choose"], {"limit": limit})
    chosen = connection.execute(_SQL["look"], {"grace": GRACE}).fetchall()
    return {source.type: Missing() for source in SOURCES} | {
        source_type: Missing(*found) for source_type, *found in chosen
    }


def _write(connection: Connection) -> Counter[str]:
    return Counter(dict(connection.execute(_SQL["enqueue"]).fetchall()))
