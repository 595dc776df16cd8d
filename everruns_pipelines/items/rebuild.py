"""Rebuild items from spans: stage -> judge -> choose -> merge in batches -> links -> rejections.

Everything up to the merge happens in temporary tables. Each batch of the merge, of the links and
the rejections is one transaction, so a rebuild that is killed leaves whole batches and nothing
else, and the next one does the rest.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.resources import files
from itertools import count, islice
from typing import LiteralString, TypeVar, cast

import psycopg
from psycopg import errors, sql
from psycopg.rows import class_row

from everruns_pipelines.databases import own_schema
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, Log, retrying
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items.envelope import Found, read_damaged, read_envelope
from everruns_pipelines.items.objects import OBJECTS_AT_ONCE, ObjectStore
from everruns_pipelines.items.reading import Selection, SpanTable, of_day, stage
from everruns_pipelines.items.scope import RebuildRequest, resolve_project

BATCH_SIZE = 5000
_VALUES_AT_ONCE = 4

# Other writers of the platform may come between: then the batch is done again.
_ATTEMPTS = 5
_COLLISIONS = (
    errors.UniqueViolation,
    errors.ForeignKeyViolation,
    errors.DeadlockDetected,
    errors.SerializationFailure,
)

T = TypeVar("T")

_PLATFORM_TABLES = ("item_organizations", "item_workspaces", "projects", "items", "item_links")


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild did, or with `dry_run` would do. Counts of distinct items and links.

    `processed` = inserted + refreshed + unchanged. Beside it, disjoint: `rejected` envelopes and
    unreadable spans, `offloaded` envelopes that were not recovered.
    """

    processed: int = 0
    inserted: int = 0
    refreshed: int = 0
    unchanged: int = 0
    rejected: int = 0
    offloaded: int = 0
    links_created: int = 0
    links_unresolved: int = 0
    #: Not part of the answer's keys, for logs and metadata.
    spans: int = 0
    spans_of_unknown_projects: int = 0
    out_of_scope: int = 0
    recovered: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])

    def with_items(self, planned: Mapping[str, int]) -> "Rebuilt":
        """This and what was done to the items of one more batch."""
        return replace(
            self,
            processed=self.processed + sum(planned.values()),
            inserted=self.inserted + planned.get("insert", 0),
            refreshed=self.refreshed + planned.get("refresh", 0),
            unchanged=self.unchanged + planned.get("unchanged", 0),
        )

    def with_links(self, planned: Mapping[str, int]) -> "Rebuilt":
        """This and what was done to the links of one more batch."""
        return replace(
            self,
            links_created=self.links_created + planned.get("create", 0),
            links_unresolved=self.links_unresolved + planned.get("unresolved", 0),
        )

    def counts(self) -> dict[str, int]:
        """The counts under the names of the interface."""
        return {name: value for name, value in asdict(self).items() if name in _COUNTS}


_COUNTS = (
    "processed",
    "inserted",
    "refreshed",
    "unchanged",
    "rejected",
    "offloaded",
    "links_created",
    "links_unresolved",
)


@dataclass(frozen=True)
class _Batch:
    round: int | None
    first: int
    last: int


def ensure_schema(connection: Connection) -> None:
    """Make what is ours in PostgreSQL, where it is missing.

    Raises:
        Refusal: it is missing and the role may not make it.
    """
    own_schema.ensure(connection, "everruns_pipelines.item_rejections", _read("schema.sql"))


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
    store = ObjectStore.at(clickhouse.settings.object_store_url)
    with postgres.connect() as connection:
        check_platform(connection)
        project = resolve_project(connection, request)
        connection.execute(_read("staging.sql"))
        names = _know_projects(connection, str(project))
        _read_spans(connection, clickhouse, log, lambda table: _selections(table, request), names)
        session = None if request.session is None else str(request.session)
        return _merge(connection, session, store, log, dry_run=request.dry_run)


def rebuild_day(
    postgres: PostgresDatabase,
    clickhouse: ClickHouseDatabase,
    day: date,
    log: Log,
    *,
    dry_run: bool = False,
) -> Rebuilt:
    """Bring the items of every known project back to what the spans of one UTC day say.

    Raises:
        Refusal: a schema is wrong. Nothing was touched.
        ClickHouseFailure: the spans could not be read. Nothing was written.
    """
    store = ObjectStore.at(clickhouse.settings.object_store_url)
    with postgres.connect() as connection:
        check_platform(connection)
        connection.execute(_read("staging.sql"))
        _know_projects(connection, None)
        _read_spans(connection, clickhouse, log, lambda _table: [of_day(day)])
        return _merge(connection, None, store, log, dry_run=dry_run)


def _read_spans(
    connection: Connection,
    clickhouse: ClickHouseDatabase,
    log: Log,
    selections: Callable[[SpanTable], Iterable[Selection]],
    projects: Sequence[str] | None = None,
) -> None:
    """Stage the selected spans. The connection to ClickHouse is open no longer than that."""

    def read() -> None:
        connection.execute("TRUNCATE staged_spans")
        with clickhouse.connect(log) as opened:
            table = SpanTable(opened, clickhouse.settings.spans_table, projects)
            table.check()
            stage(table, selections(table), connection)

    retrying(read, log)


def _selections(table: SpanTable, request: RebuildRequest) -> Iterator[Selection]:
    if request.session is not None:
        yield from table.of_session(request.session)
    yield from table.of_runs(request.run_ids)


def check_platform(connection: Connection) -> None:
    """Raise a `Refusal` if the platform's tables of items are not there."""
    rows = connection.execute(
        "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NULL",
        [list(_PLATFORM_TABLES)],
    )
    missing = [name for (name,) in rows]
    if missing:
        raise Refusal(
            "The database has no table of items: EVERRUNS_ITEMS_POSTGRES_URL must name the one "
            "that has them, or EVERRUNS_PARTS=reporting leaves items out"
            if len(missing) == len(_PLATFORM_TABLES)
            else f"The database lacks {', '.join(missing)}: it must be the platform's, "
            "with all migrations applied",
            code="incompatible_schema",
            status=503,
        )


def _know_projects(connection: Connection, project: str | None) -> list[str]:
    connection.execute(_read("known_projects.sql"), {"project": project})
    return [name for (name,) in connection.execute("SELECT name FROM staged_projects")]


def _merge(
    connection: Connection,
    session: str | None,
    store: ObjectStore | None,
    log: Log,
    *,
    dry_run: bool,
) -> Rebuilt:
    """Judge what is staged and bring the tables in line with it."""
    connection.execute(_read("repeats.sql"))
    projects = _spans_by_project(connection)
    unknown = projects.pop(None, 0)
    spans = sum(projects.values())
    log(f"{spans} spans carry items; judging them")
    _judge(connection, session)
    recovered = _recover(connection, session, store)
    if not dry_run:
        ensure_schema(connection)
        _lock(connection, filter(None, projects), log)
    _choose(connection)
    done = Rebuilt(
        spans=spans,
        spans_of_unknown_projects=unknown,
        out_of_scope=_count(
            connection, "SELECT count(*) FROM candidates WHERE state = 'out_of_scope'"
        ),
        recovered=recovered,
    )
    for number in count():
        connection.execute(_read("refs.sql"), {"round": number})
        for batch in _batches(connection, number):
            done = done.with_items(_merge_batch(connection, batch, dry_run=dry_run))
            log(f"{done.processed} items done")
        if not connection.execute(_read("revive.sql"), {"round": number + 1}).rowcount:
            break
    for batch in _batches(connection, None):
        done = done.with_links(_link_batch(connection, batch, dry_run=dry_run))
    return _account(connection, done, dry_run=dry_run)


def _spans_by_project(connection: Connection) -> dict[str | None, int]:
    """How many spans there are of each known project; under None, those of others."""
    rows = connection.execute(
        "SELECT project_id::text, sum(spans)::bigint"
        " FROM (SELECT project, count(*) AS spans FROM staged_spans GROUP BY 1) AS counted"
        " LEFT JOIN staged_projects ON name = project GROUP BY 1"
    )
    return dict(rows.fetchall())


def _judge(connection: Connection, session: str | None) -> None:
    try:
        _judge_from(connection, "readable.sql", session)
    except psycopg.DataError:
        # ClickHouse took for JSON what PostgreSQL does not: find out which, and judge again.
        connection.execute(
            "UPDATE staged_spans SET state = 'damaged',"
            " outputs = encode(convert_to(outputs, 'UTF8'), 'base64'),"
            " objects = encode(convert_to(objects, 'UTF8'), 'base64')"
            " WHERE state = 'readable' AND NOT"
            " (pg_input_is_valid(outputs, 'jsonb') AND pg_input_is_valid(objects, 'jsonb'))"
        )
        _judge_from(connection, "readable.sql", session)
    connection.execute(_read("unreadable.sql"))
    _stage_values(connection, _damaged(connection))
    _judge_from(connection, "values.sql", session)
    connection.execute("TRUNCATE staged_values")


def _judge_from(connection: Connection, found: str, session: str | None) -> None:
    query = sql.SQL(_read("judge.sql")).format(found=sql.SQL(_read(found)))
    connection.execute(query, {"session": session})


def _damaged(connection: Connection) -> Iterator[tuple[int, bool, Found]]:
    with connection.transaction(), connection.cursor("damaged") as cursor:
        cursor.itersize = 1
        cursor.execute("SELECT id, outputs, objects FROM staged_spans WHERE state = 'damaged'")
        for span, outputs, objects in cursor:
            for found in read_damaged(base64.b64decode(outputs), base64.b64decode(objects)):
                yield span, False, found


def _stage_values(connection: Connection, values: Iterable[tuple[int, bool, Found]]) -> None:
    """Put values that came another way than in a readable span beside the spans."""
    rows = (
        (
            span,
            fetched,
            found.position,
            found.key_hint,
            found.session_hint,
            found.uri,
            found.reason,
            found.detail,
            found.value,
        )
        for span, fetched, found in values
    )
    with connection.cursor() as cursor:
        while some := list(islice(rows, _VALUES_AT_ONCE)):
            cursor.executemany(
                "INSERT INTO staged_values (span, fetched, position, key_hint, session_hint, uri,"
                " reason, detail, value) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                some,
            )


def _recover(connection: Connection, session: str | None, store: ObjectStore | None) -> int:
    """Fetch offloaded envelopes that may be fetched, and judge them like any other."""
    if store is None:
        connection.execute(
            "UPDATE candidates SET detail = 'EVERRUNS_OBJECT_STORE_URL is not set'"
            " WHERE state <> 'valid' AND reason = 'offloaded'"
        )
        return 0
    with connection.transaction():
        _stage_values(connection, _fetched(connection, store))
    connection.execute(
        "DELETE FROM candidates USING staged_values AS fetched"
        " WHERE candidates.span = fetched.span AND candidates.position = fetched.position"
    )
    _judge_from(connection, "values.sql", session)
    return _count(connection, "SELECT count(*) FROM staged_values WHERE value IS NOT NULL")


def _fetched(connection: Connection, store: ObjectStore) -> Iterator[tuple[int, bool, Found]]:
    with connection.cursor("offloaded") as cursor:
        cursor.execute(_read("offloaded.sql"))
        while rows := cursor.fetchmany(OBJECTS_AT_ONCE):
            objections = [
                "the span names no uri" if uri is None else store.objection(uri, others)
                for _, _, _, uri, others in rows
            ]
            uris = [
                row[3] for row, objection in zip(rows, objections, strict=True) if not objection
            ]
            answers = iter(store.fetch(uris))
            for (span, position, key, uri, _), objection in zip(rows, objections, strict=True):
                answer = objection or next(answers)
                yield span, True, _as_found(position, key, uri, answer)


def _as_found(position: int, key: str | None, uri: str | None, answer: bytes | str) -> Found:
    if isinstance(answer, str):
        return Found(position, key, uri=uri, reason="offloaded", detail=answer)
    return read_envelope(position, key, answer)


def _choose(connection: Connection) -> None:
    """Pick one envelope per dedupe key."""
    connection.execute(_read("choose.sql"))
    connection.execute("ANALYZE chosen")


def _batches(connection: Connection, number: int | None) -> list[_Batch]:
    """Ranges of chosen candidates, of bounded size: of a round, or of all that name links."""
    cursor = connection.cursor(row_factory=class_row(_Batch))
    return cursor.execute(_read("batches.sql"), {"size": BATCH_SIZE, "round": number}).fetchall()


def _undisturbed(action: Callable[[], T], look_again: Callable[[], object]) -> T:
    """What a transaction returns; it is done again if another writer came between."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return action()
        except _COLLISIONS:
            look_again()
    return action()


def _merge_batch(connection: Connection, batch: _Batch, *, dry_run: bool) -> dict[str, int]:
    """Write the items of one batch in one transaction."""
    return _undisturbed(
        lambda: _merge_batch_once(connection, batch, dry_run=dry_run),
        # Whoever came between may hold a ref now.
        lambda: connection.execute(_read("refs.sql"), {"round": batch.round}),
    )


def _merge_batch_once(connection: Connection, batch: _Batch, *, dry_run: bool) -> dict[str, int]:
    with connection.transaction():
        connection.execute("TRUNCATE planned")
        connection.execute(_read("plan.sql"), asdict(batch))
        planned = _tally(connection, "SELECT action, count(*) FROM planned GROUP BY action")
        if not dry_run:
            if "insert" in planned:
                connection.execute(_read("insert.sql"))
            if "refresh" in planned:
                connection.execute(_read("refresh.sql"))
            connection.execute(_read("stored.sql"), asdict(batch))
    return planned


def _link_batch(connection: Connection, batch: _Batch, *, dry_run: bool) -> dict[str, int]:
    """Write the links of one batch in one transaction."""
    return _undisturbed(
        lambda: _link_batch_once(connection, batch, dry_run=dry_run),
        # The links are looked up in the transaction itself.
        lambda: None,
    )


def _link_batch_once(connection: Connection, batch: _Batch, *, dry_run: bool) -> dict[str, int]:
    with connection.transaction():
        connection.execute("TRUNCATE planned_links")
        connection.execute(_read("links.sql"), {**asdict(batch), "dry_run": dry_run})
        planned = _tally(connection, "SELECT state, count(*) FROM planned_links GROUP BY state")
        if not dry_run and "create" in planned:
            planned["create"] = connection.execute(_read("create_links.sql")).rowcount
    return planned


def _account(connection: Connection, done: Rebuilt, *, dry_run: bool) -> Rebuilt:
    """Tell what was found and is not stored."""
    connection.execute(_read("refused.sql"))
    if not dry_run:
        with connection.transaction():
            connection.execute(_read("forget.sql"))
            connection.execute(_read("reject.sql"))
    reasons = _tally(
        connection, "SELECT reason, count(*) FROM refused GROUP BY reason ORDER BY reason"
    )
    offloaded = reasons.get("offloaded", 0)
    return replace(
        done,
        rejected=sum(reasons.values()) - offloaded,
        offloaded=offloaded,
        reasons=reasons,
    )


def _lock(connection: Connection, projects: Iterable[str], log: Log) -> None:
    """One rebuild per project at a time; the locks go with the connection, however it ends."""
    for project in sorted(projects):  # In one order everywhere: nobody waits in a circle.
        key = f"everruns_pipelines.items {project}"
        query = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
        if connection.execute(query, [key]).fetchone() != (True,):
            log(f"Waiting: another rebuild of project {project} is running")
            connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [key])


def _tally(connection: Connection, query: LiteralString) -> dict[str, int]:
    return dict(connection.execute(query).fetchall())


def _count(connection: Connection, query: LiteralString) -> int:
    row = connection.execute(query).fetchone()
    return 0 if row is None else row[0]


def _read(name: str) -> LiteralString:
    # The package's own files are as literal as its source.
    return cast("LiteralString", (files("everruns_pipelines.items") / name).read_text())
