"""Our schema by its versions: upgraded in place, and used by the releases beside each other."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import LiteralString, cast
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from everruns_pipelines.databases.own_schema import OwnSchema
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items import database as items_database
from everruns_pipelines.operations.doctor import examine
from everruns_pipelines.reporting import database
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.reporting.world import rows, value, wait_until, waiting

PARTS = pytest.mark.parametrize(
    "own", [database.OWN, items_database.OWN], ids=["reporting", "items"]
)

# What the script of each version is. Once released it stays: what changes then is the next version.
SCRIPTS = {
    ("everruns_pipelines.reporting", 2): "3ec796006cabf217",
    ("everruns_pipelines.items", 1): "496cd7c8dc592243",
}


@PARTS
def test_a_script_that_changes_gets_another_version(own: OwnSchema) -> None:
    script = re.sub(r"^--.*\n|\s+", " ", read_sql(own.package, "schema.sql"), flags=re.MULTILINE)
    found = sha256(script.encode()).hexdigest()[:16]
    assert SCRIPTS[own.package, own.version] == found


def of_0_1_0(own: OwnSchema) -> LiteralString:
    """The script of release 0.1.0."""
    name = own.package.rpartition(".")[2]
    text = (Path(__file__).parent / "release_0_1_0" / f"{name}.sql").read_text()
    return cast("LiteralString", text)


def make_0_1_0(connection: Connection, own: OwnSchema) -> str:
    """Do what release 0.1.0 does where it finds another note than its own; the note."""
    note = sha256(of_0_1_0(own).encode()).hexdigest()[:16]
    connection.execute(sql.SQL(of_0_1_0(own)))
    connection.execute(
        sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.SQL(own.table), sql.Literal(note))
    )
    return note


def ours(connection: Connection) -> list[tuple[object, ...]]:
    """What stands in our schema, to the version of each catalog row, and what is noted of it."""
    return rows(
        connection,
        "SELECT relname, oid, xmin::text, obj_description(oid, 'pg_class') FROM pg_class"
        " WHERE relnamespace = to_regnamespace('everruns_pipelines') ORDER BY 1",
    )


@pytest.fixture
def worker(connection: Connection, postgres_url: str) -> Iterator[Connection]:
    """A role that may use the tables of our schema, also those that are made later, and no more."""
    role = f"role_{uuid4().hex}"
    for statement in (
        "CREATE ROLE {} LOGIN",
        "CREATE SCHEMA everruns_pipelines",
        "GRANT USAGE ON SCHEMA everruns_pipelines TO {}",
        (
            "ALTER DEFAULT PRIVILEGES IN SCHEMA everruns_pipelines"
            " GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {}"
        ),
    ):
        connection.execute(sql.SQL(statement).format(sql.Identifier(role)))
    with psycopg.connect(make_conninfo(postgres_url, user=role), autocommit=True) as worker:
        yield worker


def note(connection: Connection, own: OwnSchema, text: str) -> None:
    """Have another release made it."""
    connection.execute(
        sql.SQL("COMMENT ON INDEX {} IS {}").format(
            sql.SQL(f"{own.table}_pkey"),  # pyright: ignore[reportArgumentType]
            sql.Literal(text),
        )
    )


@PARTS
def test_the_previous_release_finds_its_own_note(connection: Connection, own: OwnSchema) -> None:
    """It makes everything anew at any other, and refuses a role that may not."""
    expected = sha256(of_0_1_0(own).encode()).hexdigest()[:16]
    own.ensure(connection)
    noted = "SELECT obj_description(to_regclass(%s), 'pg_class')"
    assert value(connection, noted, own.table) == expected


def test_an_older_schema_is_upgraded_by_whoever_may_and_keeps_its_rows(
    connection: Connection, worker: Connection
) -> None:
    make_0_1_0(connection, database.OWN)
    connection.execute(
        "INSERT INTO everruns_pipelines.fact_rejections (fact, org_id, source_key, reason, written)"
        " VALUES ('fact_turn', 1, 'key', 'reason', true)"
    )
    before = ours(connection)

    with pytest.raises(Refusal) as refused:
        database.ensure_schema(worker)
    owner = connection.info.user
    assert refused.value.code == "permission_denied"
    assert refused.value.detail == (
        "everruns_pipelines.fact_rejections is of version 1, and this release needs version 2: "
        f"run its `everruns-pipelines init` as its owner {owner}"
    )
    assert ours(connection) == before

    database.ensure_schema(connection)
    database.ensure_schema(worker)
    database.check_own_tables(worker)
    assert value(worker, "SELECT count(*) FROM everruns_pipelines.fact_rejections") == 1


def test_what_the_previous_release_makes_again_is_ours_still(connection: Connection) -> None:
    database.ensure_schema(connection)
    before = ours(connection)

    make_0_1_0(connection, database.OWN)
    database.OWN.check(connection)

    assert [row[:2] for row in ours(connection)] == [row[:2] for row in before]


def test_a_newer_schema_is_used_as_it_is(connection: Connection, worker: Connection) -> None:
    database.ensure_schema(connection)
    note(connection, database.OWN, "version 9, usable by code of version 2 or newer")
    before = ours(connection)

    for role in (connection, worker):
        database.ensure_schema(role)
        database.OWN.check(role)

    assert ours(connection) == before


def test_a_newer_schema_that_says_no_is_left_alone(
    connection: Connection, settings: Settings
) -> None:
    database.ensure_schema(connection)
    note(connection, database.OWN, "version 9, usable by code of version 3 or newer")
    before = ours(connection)

    with pytest.raises(Refusal, match="its version 9 must not be used by code of version 2") as no:
        database.ensure_schema(connection)

    assert no.value.code == "incompatible_schema"
    assert ours(connection) == before
    told = [finding.text for finding in examine(settings) if not finding.ok]
    assert no.value.detail in told


def test_who_waits_for_a_newer_release_to_make_it_does_not_go_back(
    connection: Connection, postgres: PostgresDatabase
) -> None:
    newer = replace(database.OWN, version=3)
    with postgres.connect() as other, ThreadPoolExecutor(1) as pool:
        with connection.transaction():
            newer.ensure(connection)
            older = pool.submit(database.OWN.ensure, other)
            wait_until(lambda: waiting(connection), "the older release to wait")
        older.result()
    newer.check(connection)


_INIT = "from everruns_pipelines.commands.main import main; main()"


def test_init_that_is_killed_leaves_nothing_and_is_done_again(
    connection: Connection, postgres: PostgresDatabase, postgres_url: str
) -> None:
    make_0_1_0(connection, database.OWN)
    before = ours(connection)
    environment = {
        **os.environ,
        "EVERRUNS_POSTGRES_URL": postgres_url,
        "EVERRUNS_PARTS": "reporting",
    }
    init = [sys.executable, "-c", _INIT, "init"]
    with postgres.connect() as other, other.transaction():
        other.execute("LOCK TABLE everruns_pipelines.fact_rejections IN SHARE MODE")
        with subprocess.Popen(init, env=environment) as process:
            wait_until(lambda: waiting(connection), "init to be in the midst of it")
            process.kill()
    wait_until(lambda: not waiting(connection), "the server to notice")
    assert ours(connection) == before

    for _ in range(2):
        done = subprocess.run(init, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        database.OWN.check(connection)
