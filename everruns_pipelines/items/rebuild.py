"""Rebuild items from spans: read -> judge -> recover -> merge -> link -> account.

Everything up to the merge happens in temporary tables. Each batch of the merge, of the links and
the rejections is one transaction, so a rebuild that is killed leaves whole batches and nothing
else, and the next one does the rest.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from uuid import UUID

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, Log
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase, wait_for_lock
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.items.accounting import Rebuilt, account
from everruns_pipelines.items.database import check_platform, ensure_schema
from everruns_pipelines.items.judging import judge
from everruns_pipelines.items.linking import link
from everruns_pipelines.items.merging import merge
from everruns_pipelines.items.objects import ObjectStore
from everruns_pipelines.items.reading import read_spans
from everruns_pipelines.items.recovery import recover
from everruns_pipelines.items.scope import RebuildRequest, know_projects, resolve_project
from everruns_pipelines.items.span_table import Selection, SpanTable, of_day

# How long an item may take from its span to the platform's table before it counts as missing.
GRACE = timedelta(minutes=15)
# How long one rebuild of a project waits for another, in seconds: longer than any sane one takes.
_LOCK_SECONDS = 3600


@dataclass(frozen=True)
class _Scope:
    """What is rebuilt.

    Args:
        selections: which spans.
        project: whose; None = of every known project.
        session: of spans that are not meant as a whole, the envelopes that name it are.
    """

    selections: Callable[[SpanTable], Iterable[Selection]]
    project: UUID | None = None
    session: UUID | None = None


def rebuild(
    postgres: PostgresDatabase, clickhouse: ClickHouseDatabase, request: RebuildRequest, log: Log
) -> Rebuilt:
    """Bring the items of a session or of runs back to what their spans say.

    Args:
        log: told of progress; never of payload.

    Raises:
        Refusal: the request, the scope or a schema is wrong. Nothing was touched.
        ClickHouseFailure: the spans could not be read. Nothing was written.
    """
    request.check()
    with postgres.connect() as connection:
        check_platform(connection)
        project = resolve_project(connection, request)
        scope = _Scope(lambda table: _selections(table, request, log), project, request.session)
        return _rebuild(connection, clickhouse, scope, log, dry_run=request.dry_run)


def rebuild_day(
    postgres: PostgresDatabase,
    clickhouse: ClickHouseDatabase,
    day: date,
    log: Log,
    *,
    dry_run: bool = False,
    grace: timedelta | None = None,
) -> Rebuilt:
    """Bring the items of every known project back to what the spans of one UTC day say.

    Args:
        grace: leave out what is not stored and was reported so lately; None to leave out nothing.

    Raises:
        Refusal: a schema is wrong. Nothing was touched.
        ClickHouseFailure: the spans could not be read. Nothing was written.
    """
    with postgres.connect() as connection:
        check_platform(connection)
        scope = _Scope(lambda _table: [of_day(day)])
        return _rebuild(connection, clickhouse, scope, log, dry_run=dry_run, grace=grace)


def _selections(table: SpanTable, request: RebuildRequest, log: Log) -> Iterator[Selection]:
    if request.session_id is not None:
        yield from table.of_session(request.session_id, log)
    yield from table.of_runs(request.run_ids)


def _rebuild(
    connection: Connection,
    clickhouse: ClickHouseDatabase,
    scope: _Scope,
    log: Log,
    *,
    dry_run: bool,
    grace: timedelta | None = None,
) -> Rebuilt:
    store = ObjectStore.at(clickhouse.settings.object_store_url)
    session = None if scope.session is None else str(scope.session)

    connection.execute(read_sql("everruns_pipelines.items", "staging.sql"))
    names = know_projects(connection, scope.project)
    # A project's own spans are few among all. Of every project none is left out: spans of
    # unknown ones are counted.
    wanted = None if scope.project is None else names
    spans = read_spans(connection, clickhouse, scope.selections, wanted, log)
    unknown = spans.pop(None, 0)
    log(f"{sum(spans.values())} spans carry items; judging them")
    judge(connection, session)
    recovered = recover(connection, session, store)
    out_of_scope = _out_of_scope(connection)
    if not dry_run:
        ensure_schema(connection)
        _lock(connection, filter(None, spans), log)
    merged = merge(connection, log, dry_run=dry_run, grace=grace)
    for item, fields in merged.taken_back:
        log(f"{'Would take' if dry_run else 'Took'} back {', '.join(fields)} of item {item}")
    links = link(connection, dry_run=dry_run)
    reasons = account(connection, dry_run=dry_run)

    items = merged.counts
    offloaded = reasons.get("offloaded", 0)
    return Rebuilt(
        processed=items.total(),
        inserted=items["insert"],
        refreshed=items["refresh"],
        unchanged=items["unchanged"],
        rejected=sum(reasons.values()) - offloaded,
        offloaded=offloaded,
        links_created=links["create"],
        links_unresolved=links["unresolved"],
        spans=sum(spans.values()),
        spans_of_unknown_projects=unknown,
        out_of_scope=out_of_scope,
        recovered=recovered,
        underway=merged.underway,
        reasons=reasons,
        taken_back=merged.taken_back,
    )


def _out_of_scope(connection: Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM candidates WHERE state = 'out_of_scope'"
    ).fetchone()
    return 0 if row is None else row[0]


def _lock(connection: Connection, projects: Iterable[str], log: Log) -> None:
    """One rebuild per project at a time; the locks go with the connection, however it ends."""
    for project in sorted(projects):  # In one order everywhere: nobody waits in a circle.
        name = f"everruns_pipelines.items {project}"
        row = connection.execute("SELECT hashtextextended(%s, 0)", [name]).fetchone()
        assert row is not None
        while connection.execute("SELECT pg_try_advisory_lock(%s)", row).fetchone() != (True,):
            running = f"another rebuild of project {project} is running"
            log(f"Waiting: {running}")
            wait_for_lock(connection, row[0], running.capitalize(), _LOCK_SECONDS)
