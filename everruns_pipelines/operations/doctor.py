"""Whether everything is in place: each question answered by ok, or by what to do. Reads only."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import psycopg

from everruns_pipelines import dagster_storage
from everruns_pipelines.databases.clickhouse import (
    ClickHouseDatabase,
    ClickHouseFailure,
)
from everruns_pipelines.databases.own_schema import OwnSchema
from everruns_pipelines.databases.postgres import (
    Connection,
    ItemsPostgresDatabase,
    PostgresDatabase,
)
from everruns_pipelines.errors import Refusal, SettingsError
from everruns_pipelines.items import database as items_database
from everruns_pipelines.items.objects import ObjectStore
from everruns_pipelines.items.span_table import SpanTable
from everruns_pipelines.operations.alerts import receivers
from everruns_pipelines.reporting import database
from everruns_pipelines.settings import Part, Settings

_OLDEST_CLICKHOUSE = (24, 8)
# What a server may be too old for, and since when there is such a thing.
_NEWS = {"tables with JSON attributes": (25, 3), "text indexes": (26, 2)}


@dataclass(frozen=True)
class Finding:
    """One answer. `text` says what is there, or what is wrong and what to do."""

    name: str
    ok: bool
    text: str


class _Todo(Exception):
    """What is wrong and what to do, in its message."""


def examine(settings: Settings) -> Iterator[Finding]:
    """Ask every question, in the order in which one leads to the next.

    Yields:
        The answers, each as soon as it is known.
    """
    on = " and ".join(settings.parts)
    yield Finding("settings", True, f"every variable that is set is right; {on} on")
    for part in settings.parts:
        server, of_server, of_the_rest = _QUESTIONS[part]
        first = _answer(f"PostgreSQL of {part}", server, settings)
        yield first
        questions = {**of_server, **of_the_rest} if first.ok else of_the_rest
        for name, question in questions.items():
            yield _answer(name, question, settings)
    yield _answer("Dagster's storage", _dagster_storage, settings)
    yield _answer("alerts", _alerts, settings)


def _answer(name: str, question: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(name, True, question(settings))
    except _Todo as todo:
        return Finding(name, False, str(todo))
    except Refusal as refusal:
        return Finding(name, False, refusal.detail)
    except (ClickHouseFailure, SettingsError) as failure:
        return Finding(name, False, str(failure))
    except psycopg.Error as error:
        return Finding(name, False, error.diag.message_primary or type(error).__name__)


def _reporting_server(settings: Settings) -> str:
    return _server(PostgresDatabase(settings))


def _items_server(settings: Settings) -> str:
    return _server(ItemsPostgresDatabase(settings))


def _server(postgres: PostgresDatabase) -> str:
    kind = "embedded" if postgres.configured is None else f"of {postgres.variable}"
    with postgres.connect() as connection:
        version = connection.info.server_version
        user, database_name = connection.info.user, connection.info.dbname
    return f"{kind}, version {version // 10_000}.{version % 10_000}, {user} in {database_name}"


def _reporting_tables(settings: Settings) -> str:
    with PostgresDatabase(settings).connect() as connection:
        database.check_platform(connection)
    return "every table, column and privilege that reporting needs"


def _item_tables(settings: Settings) -> str:
    with ItemsPostgresDatabase(settings).connect() as connection:
        items_database.check_platform(connection)
    return "every table, column and privilege that items need"


def _reporting_schema(settings: Settings) -> str:
    return _own_schema(
        PostgresDatabase(settings), database.OWN, database.OWN_TABLES, database.check_own_tables
    )


def _items_schema(settings: Settings) -> str:
    return _own_schema(
        ItemsPostgresDatabase(settings),
        items_database.OWN,
        [items_database.OWN_TABLE],
        items_database.check_own_tables,
    )


def _own_schema(
    postgres: PostgresDatabase,
    own: OwnSchema,
    tables: Iterable[str],
    check: Callable[[Connection], None],
) -> str:
    with postgres.connect() as connection:
        # First: in a schema that is closed to the role no table can be looked up.
        check(connection)
        own.check(connection)
        for table in tables:
            if not _exists(connection, table):
                raise _Todo(f"the table {table} is missing: run `everruns-pipelines init`")
    return f"what is ours in the schema everruns_pipelines is there, for version {own.version}"


def _event_index(settings: Settings) -> str:
    with PostgresDatabase(settings).connect() as connection:
        if not database.has_event_index(connection):
            raise _Todo(
                "without an index on events.ts each day reads all events: "
                "run `everruns-pipelines init --indexes`"
            )
    return "the days of events are found by index"


def _alerts(settings: Settings) -> str:
    number = len(receivers(settings))
    if not number:
        return "EVERRUNS_ALERT_URLS is not set: nobody is told of problems"
    return f"{number} receivers are told of problems; `everruns-pipelines alert-test` tries them"


def _dagster_storage(settings: Settings) -> str:
    url = dagster_storage.storage_url(settings)
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            if not _exists(connection, "public.runs"):
                return "reachable; Dagster makes its tables when it starts"
            row = connection.execute("SELECT count(*) FROM runs").fetchone()
    except psycopg.OperationalError as error:
        raise _Todo(
            f"{str(error).strip()}: EVERRUNS_DAGSTER_POSTGRES_URL must name a running server"
        ) from None
    return f"reachable, {0 if row is None else row[0]} runs"


def _spans(settings: Settings) -> str:
    clickhouse = ClickHouseDatabase(settings)
    if not clickhouse.is_there():
        return "embedded, not used yet: set EVERRUNS_CLICKHOUSE_DSN to rebuild items from spans"
    with clickhouse.connect(patience=10.0) as opened:
        return _span_table(SpanTable.of(opened, settings.spans_table), opened.version)


def _span_table(table: SpanTable, version: str) -> str:
    """What the span table is, and how spans are found in it."""
    server = tuple(int(part) for part in version.split(".")[:2])
    if server < _OLDEST_CLICKHOUSE:
        raise _Todo(f"ClickHouse {version} is older than 24.8, the oldest that is supported")
    told = [f"{table.database}.{table.name}, {table.generation}, on ClickHouse {version}"]
    told += [f"which is too old for {what}" for what, since in _NEWS.items() if server < since]
    if table.is_json:
        told.append("no index finds a trace, a session or a run: all spans are passed over")
    elif table.is_plain:
        lacking = [
            f"{column}, which finds the spans of {what}"
            for column, what, index in (
                ("TraceId", "a trace", table.trace_index),
                ("mapValues(SpanAttributes)", "a session or a run", table.value_index),
            )
            if index is None
        ]
        if lacking:
            raise _Todo(
                f"{table.name} has no index on {'; nor on '.join(lacking)}: add a bloom_filter"
            )
        told.append(f"spans are found by {table.trace_index} and {table.value_index} indexes")
    else:
        told.append("how spans are found is up to the tables behind it")
    return "; ".join(told)


def _object_store(settings: Settings) -> str:
    if ObjectStore.at(settings.object_store_url) is None:
        return "not configured: offloaded items are counted, not recovered"
    return "configured, and a library for it is installed"


def _exists(connection: psycopg.Connection, relation: str) -> bool:
    return connection.execute("SELECT to_regclass(%s) IS NOT NULL", [relation]).fetchone() == (
        True,
    )


_Questions = Mapping[str, Callable[[Settings], str]]
# By part: its PostgreSQL, what is asked of that one if it answers, and the rest.
_QUESTIONS: Mapping[Part, tuple[Callable[[Settings], str], _Questions, _Questions]] = {
    "reporting": (
        _reporting_server,
        {
            "reporting's tables": _reporting_tables,
            "our own tables for reporting": _reporting_schema,
            "index on events": _event_index,
        },
        {},
    ),
    "items": (
        _items_server,
        {"items' tables": _item_tables, "our own tables for items": _items_schema},
        {"spans": _spans, "object store": _object_store},
    ),
}
