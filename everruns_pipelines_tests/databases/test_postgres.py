"""Connections: what the URL says holds, and so does what our statements rely on."""

from urllib.parse import quote

import pytest
from dagster import DagsterInstance, DagsterRun
from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import drain_all, materialize

OURS = {
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "default_transaction_isolation": "read committed",
    "client_encoding": "UTF8",
    "jit": "off",
}


def at(url: str) -> PostgresDatabase:
    return PostgresDatabase(Settings.from_environment({"EVERRUNS_POSTGRES_URL": url}))


def with_parameters(url: str, **parameters: str) -> str:
    given = "&".join(f"{name}={quote(value)}" for name, value in parameters.items())
    return f"{url}{'&' if '?' in url else '?'}{given}"


def shown(connection: Connection, *names: str) -> dict[str, str]:
    row = connection.execute(
        sql.SQL("SELECT {}").format(
            sql.SQL(", ").join(
                sql.SQL("current_setting({})").format(sql.Literal(name)) for name in names
            )
        )
    ).fetchone()
    assert row is not None
    return dict(zip(names, row, strict=True))


def test_the_options_and_the_timeout_of_the_url_hold(postgres_url: str) -> None:
    url = with_parameters(
        postgres_url,
        options=r"-c search_path=elsewhere,public -c statement_timeout=7s -c timezone=Asia/Tokyo",
        connect_timeout="3",
    )
    with at(url).connect() as connection:
        assert shown(connection, "search_path", "statement_timeout") == {
            "search_path": "elsewhere,public",
            "statement_timeout": "7s",
        }
        assert connection.info.get_parameters()["connect_timeout"] == "3"
        assert shown(connection, *OURS) == OURS


def test_a_url_without_a_timeout_waits_ten_seconds(postgres_url: str) -> None:
    with at(postgres_url).connect() as connection:
        assert connection.info.get_parameters()["connect_timeout"] == "10"


@pytest.mark.parametrize("client_encoding", ["SQL_ASCII", "LATIN1"])
def test_whatever_the_defaults_of_the_database_the_facts_are_right(
    connection: Connection, postgres_url: str, client_encoding: str
) -> None:
    name = sql.Identifier(connection.info.dbname)
    for setting in (
        "timezone = 'Asia/Kathmandu'",
        "datestyle = 'SQL, MDY'",
        "default_transaction_isolation = 'serializable'",
        "client_encoding = 'LATIN1'",
    ):
        connection.execute(sql.SQL("ALTER DATABASE {} SET {}").format(name, sql.SQL(setting)))

    with at(with_parameters(postgres_url, client_encoding=client_encoding)).connect() as own:
        assert shown(own, *OURS) == OURS
        database.prepare(own)
        load_adversarial_sources(own, seed=21, sessions=4)
        assert enqueue(own, BackfillRequest(limit=10_000))["enqueued"] > 0
        assert drain_all(own).failed == 0
        materialize(own)

    assert differences(connection) == []


def test_dagsters_storage_may_have_several_hosts_and_options_too(
    connection: Connection, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = connection.info
    hosts = f"127.0.0.1:1,{quote(info.host, safe='')}:{info.port}"
    connection.execute("CREATE SCHEMA dagster")
    monkeypatch.setenv(
        "EVERRUNS_DAGSTER_POSTGRES_URL",
        f"postgresql://{info.user}:p%40ss+word@{hosts}/{info.dbname}"
        "?options=-c%20search_path%3Ddagster%20-c%20application_name%3Da%2Bb",
    )

    with DagsterInstance.from_config(str(ROOT)) as instance:
        run_id = instance.add_run(DagsterRun("job")).run_id

    assert connection.execute("SELECT run_id FROM dagster.runs").fetchall() == [(run_id,)]


def test_of_several_hosts_one_that_answers_is_enough(
    connection: Connection, postgres_url: str
) -> None:
    info = connection.info
    hosts = f"127.0.0.1:1,{quote(info.host, safe='')}:{info.port}"

    with at(f"postgresql://{info.user}@{hosts}/{info.dbname}").connect() as own:
        assert own.info.dbname == info.dbname
