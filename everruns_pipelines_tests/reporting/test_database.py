"""What reporting needs of a database is checked before anything is written, and suffices."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import LiteralString, cast
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.outbox import purge
from everruns_pipelines.reporting.reconcile import compare_days
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    DAY,
    drain_all,
    enqueue_all,
    materialize,
    rows,
    value,
)

As = Callable[..., Connection]


def ours(connection: Connection) -> list[tuple[object, ...]]:
    """What stands in our schema, to the version of each catalog row."""
    return rows(
        connection,
        "SELECT relname, oid, xmin::text FROM pg_class"
        " WHERE relnamespace = to_regnamespace('everruns_pipelines') ORDER BY 1",
    )


def refused(connection: Connection) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        database.prepare(connection)
    assert refusal.value.status == 503
    return refusal.value


def test_everything_that_is_lacking_is_named_before_anything_is_written(
    connection: Connection,
) -> None:
    connection.execute("DROP TABLE fact_turn")
    connection.execute("ALTER TABLE sessions DROP COLUMN blueprint_id CASCADE")
    connection.execute("ALTER TABLE reporting_outbox RENAME claimed_at TO other")

    refusal = refused(connection)

    assert refusal.code == "incompatible_schema"
    for lacking in (
        "column sessions.blueprint_id",
        "column reporting_outbox.claimed_at",
        "table fact_turn",
    ):
        assert lacking in refusal.detail
    assert value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")


def test_an_old_server_is_refused_by_its_version(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_OLDEST_SERVER", 99)

    refusal = refused(connection)

    assert refusal.code == "incompatible_schema"
    assert refusal.detail == "PostgreSQL 99 or newer is needed, this is 18"
    assert value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")


@pytest.fixture
def connected_as(connection: Connection, postgres_url: str) -> Iterator[As]:
    """Connects as a new role, with what the statements grant it."""
    connections: list[Connection] = []

    def connected_as(*grants: LiteralString) -> Connection:
        role = f"role_{uuid4().hex}"
        for statement in ("CREATE ROLE {} LOGIN", *grants):
            connection.execute(sql.SQL(statement).format(sql.Identifier(role)))
        connections.append(psycopg.connect(make_conninfo(postgres_url, user=role), autocommit=True))
        return connections[-1]

    yield connected_as
    for opened in connections:
        opened.close()


PLATFORM: LiteralString = "GRANT ALL ON ALL TABLES IN SCHEMA public TO {}"
OUR_TABLES: tuple[LiteralString, ...] = (
    "GRANT USAGE ON SCHEMA everruns_pipelines TO {}",
    "GRANT ALL ON ALL TABLES IN SCHEMA everruns_pipelines TO {}",
)


def test_privileges_that_the_role_lacks_are_named_before_anything_is_written(
    connection: Connection, connected_as: As
) -> None:
    role = connected_as(
        PLATFORM,
        "REVOKE INSERT, DELETE ON fact_turn FROM {}",
        "REVOKE UPDATE ON reporting_outbox FROM {}",
        "REVOKE SELECT ON agents FROM {}",
    )

    refusal = refused(role)

    assert refusal.code == "permission_denied"
    assert refusal.detail == (
        "The database role lacks SELECT (id, name, org_id) on agents; DELETE on fact_turn; "
        "INSERT on fact_turn; UPDATE on reporting_outbox: "
        "deploy/postgres/roles.sql grants what is needed"
    )
    assert value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")


def test_a_role_that_may_make_no_temporary_tables_is_refused_before_anything_is_written(
    connection: Connection, connected_as: As
) -> None:
    database.prepare(connection)
    name = connection.info.dbname
    connection.execute(
        sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name))
    )
    refusal = refused(connected_as(PLATFORM, *OUR_TABLES))

    assert refusal.code == "permission_denied"
    assert f"lacks TEMPORARY on database {name}" in refusal.detail


def test_a_role_that_may_not_make_our_schema_is_told_who_can(
    connection: Connection, connected_as: As
) -> None:
    refusal = refused(connected_as(PLATFORM))

    assert refusal.code == "permission_denied"
    assert "everruns-pipelines init" in refusal.detail
    assert value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")


def test_a_role_that_may_not_use_our_schema_is_told_so(
    connection: Connection, connected_as: As
) -> None:
    database.prepare(connection)

    role = connected_as(PLATFORM)
    refusal = refused(role)
    assert refusal.code == "permission_denied"
    # What it says helps.
    grants = refusal.detail.partition("by: ")[2]
    assert grants.startswith("GRANT USAGE ON SCHEMA everruns_pipelines TO ")
    connection.execute(cast("LiteralString", grants))
    database.prepare(role)
    may_look = "GRANT USAGE ON SCHEMA everruns_pipelines TO {}"
    refusal = refused(connected_as(PLATFORM, may_look))
    assert "INSERT on everruns_pipelines.outbox_suspects" in refusal.detail


def test_a_role_with_our_tables_and_the_platforms_needs_nothing_more(
    connection: Connection, connected_as: As
) -> None:
    database.prepare(connection)
    load_adversarial_sources(connection, seed=8, sessions=3)
    role = connected_as(
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}",
        *(f"GRANT INSERT, UPDATE, DELETE ON {fact.table} TO {{}}" for fact in FACTS),  # pyright: ignore[reportArgumentType]
        "GRANT INSERT, UPDATE, DELETE ON reporting_outbox TO {}",
        *OUR_TABLES,
    )

    database.prepare(role)
    assert enqueue(role, BackfillRequest())["enqueued"] > 0
    assert drain_all(role).failed == 0
    materialize(role)
    purge(role, timedelta(0))

    assert differences(connection) == []


def keep_only_what_is_declared(connection: Connection) -> None:
    """Replace the platform's schema by one with the declared tables and columns only."""
    connection.execute("ALTER SCHEMA public RENAME TO complete")
    connection.execute("CREATE SCHEMA public")
    for table, columns in database.needed_columns().items():
        listed = sql.SQL(", ").join(map(sql.Identifier, columns))
        connection.execute(
            sql.SQL("CREATE TABLE public.{0} AS SELECT {1} FROM complete.{0}").format(
                sql.Identifier(table), listed
            )
        )
        if table.startswith("fact_"):
            connection.execute(
                sql.SQL(
                    "ALTER TABLE public.{} ADD PRIMARY KEY (org_id, source_key),"
                    " ALTER projected_at SET DEFAULT now(), ALTER projected_at SET NOT NULL"
                ).format(sql.Identifier(table))
            )
    connection.execute(
        "ALTER TABLE public.reporting_outbox"
        " ADD UNIQUE (org_id, source_type, source_id, source_version, reason),"
        " ALTER id SET DEFAULT uuidv7(), ALTER status SET DEFAULT 'pending',"
        " ALTER attempts SET DEFAULT 0, ALTER next_attempt_at SET DEFAULT now(),"
        " ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now()"
    )
    connection.execute("DROP SCHEMA complete CASCADE")


def test_with_the_declared_tables_and_columns_alone_everything_runs(
    connection: Connection,
) -> None:
    load_adversarial_sources(connection, seed=7, sessions=6, events_per_session=15)
    keep_only_what_is_declared(connection)

    database.prepare(connection)
    enqueued = enqueue(connection, BackfillRequest(limit=10_000))["enqueued"]
    drained = drain_all(connection)
    enqueue_all(connection)
    drain_all(connection)

    assert drained.completed == enqueued > 0
    assert differences(connection) == []
    assert enqueue(connection, BackfillRequest())["enqueued"] == 0
    materialize(connection, remove_orphans=True)
    for fact in FACTS:
        state = compare_days(connection, fact, DAY, DAY)[DAY]
        assert (state.missing, state.stale, state.superseded, state.orphaned) == (0, 0, 0, 0)
    assert purge(connection, timedelta(0)) > 0
    database.create_indexes(connection)


def test_the_described_columns_of_the_sources_are_those_that_are_read() -> None:
    needed = database.needed_columns()
    for table, columns in SOURCE_COLUMNS.items():
        assert sorted(column.name for column in columns) == sorted(needed[table])


def test_preparing_again_changes_nothing(ready: Connection) -> None:
    before = ours(ready)
    assert before != []

    database.prepare(ready)

    assert ours(ready) == before


def test_our_schema_is_made_once_by_many_at_once(
    connection: Connection, postgres: PostgresDatabase
) -> None:
    def prepare(_: int) -> None:
        with postgres.connect() as own:
            database.prepare(own)

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(prepare, range(4)))

    assert ours(connection) != []


def test_the_recommended_index_is_made_on_request_and_once(ready: Connection) -> None:
    index: LiteralString = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)"
    assert rows(ready, index, "events_ts_projected") == []

    for _ in range(2):
        database.create_indexes(ready)

    assert rows(ready, index, "events_ts_projected") == [(True,)]


def test_an_index_whose_build_was_aborted_is_made_anew(ready: Connection) -> None:
    database.create_indexes(ready)
    ready.execute(
        "UPDATE pg_index SET indisvalid = false"
        " WHERE indexrelid = to_regclass('events_ts_projected')"
    )
    assert database.has_event_index(ready) is False

    database.create_indexes(ready)

    assert database.has_event_index(ready) is True


def test_an_organization_that_does_not_exist_is_refused(connection: Connection) -> None:
    with pytest.raises(Refusal) as refusal:
        database.require_org(connection, 4_711)

    assert (refusal.value.code, refusal.value.status) == ("not_found_error", 404)
    assert refusal.value.errors[0].loc == ("org_id",)
