"""Connections: what the URL says holds, and so does what our statements rely on."""

import os
import signal
import socket
import subprocess
import sys
from threading import Event
from time import monotonic
from urllib.parse import quote

import psycopg
import pytest
from dagster import DagsterInstance, DagsterRun
from psycopg import sql

from everruns_pipelines.databases.postgres import (
    Connection,
    PostgresDatabase,
    transaction,
    wait_for_lock,
)
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    drain_all,
    materialize,
    value,
    wait_until,
)

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
    connection: Connection, monkeypatch: pytest.MonkeyPatch
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


def test_of_several_hosts_one_that_answers_is_enough(connection: Connection) -> None:
    info = connection.info
    hosts = f"127.0.0.1:1,{quote(info.host, safe='')}:{info.port}"

    with at(f"postgresql://{info.user}@{hosts}/{info.dbname}").connect() as own:
        assert own.info.dbname == info.dbname


_HOLDER = """
import sys
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.settings import Settings

with PostgresDatabase(Settings.from_environment()).connect() as connection:
    connection.execute("SELECT pg_advisory_lock(7), pg_sleep(600)")
"""


def test_what_a_killed_process_held_is_free_within_seconds_though_its_statement_goes_on(
    connection: Connection, postgres_url: str
) -> None:
    environment = os.environ | {"EVERRUNS_POSTGRES_URL": postgres_url}
    with subprocess.Popen([sys.executable, "-c", _HOLDER], env=environment) as holder:
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        wait_until(lambda: value(connection, held), "the lock to be held")
        holder.kill()
        holder.wait()
        with transaction(connection):
            wait_for_lock(connection, 7, "a test", 20)


def test_who_waits_for_an_advisory_lock_in_vain_is_told_who_holds_it(
    connection: Connection, postgres_url: str
) -> None:
    with at(postgres_url).connect() as other:
        other.execute("SELECT pg_advisory_lock(7)")
        told = (
            f"^A test: the advisory lock 0x7 is held by the server's process "
            rf"{other.info.backend_pid} \(everruns_pipelines, since 2.*\), "
            "and was not free within 0.1 s"
        )
        with pytest.raises(Refusal, match=told) as caught, transaction(connection):
            wait_for_lock(connection, 7, "A test", 0.1)
    assert caught.value.code == "locked"


def test_who_waits_for_a_row_in_vain_is_told_who_holds_its_table(
    connection: Connection, postgres_url: str
) -> None:
    connection.execute("CREATE TABLE thing AS SELECT 1 AS id")
    impatient = at(with_parameters(postgres_url, options="-c lock_timeout=100ms"))
    application = with_parameters(postgres_url, application_name="the platform")
    with psycopg.connect(application) as other:
        other.execute("UPDATE thing SET id = 2")
        told = (
            rf"^A lock on table thing is held by the server's process {other.info.backend_pid} "
            r"\(the platform, since "
        )
        with pytest.raises(Refusal, match=told), impatient.connect() as own:
            own.execute("UPDATE thing SET id = 3")


def test_a_statement_is_cancelled_when_its_process_is_interrupted(
    connection: Connection, postgres: PostgresDatabase
) -> None:
    class Interrupted(BaseException): ...

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Interrupted), postgres.connect() as own:
            own.execute("SELECT pg_sleep(600)")
        # Whoever makes nothing of it can leave in order.
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with postgres.connect() as own, pytest.raises(Interrupted):
            own.execute("SELECT pg_sleep(600)")
    finally:
        signal.signal(signal.SIGALRM, before)
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    wait_until(lambda: value(connection, asleep) == 0, "the statement to end")


def test_a_server_that_freezes_costs_no_more_than_the_time_allowed(
    postgres: PostgresDatabase,
) -> None:
    def ask() -> None:
        with postgres.connect(within=1) as own:
            server = own.info.backend_pid
            os.kill(server, signal.SIGSTOP)
            try:
                own.execute("SELECT 1")
            finally:
                os.kill(server, signal.SIGCONT)

    began = monotonic()
    with pytest.raises(Refusal, match="PostgreSQL has not answered within 1 s"):
        ask()
    assert monotonic() - began < 5


def test_a_connection_that_was_cut_says_so_while_the_timer_is_still_at_it(
    postgres: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown, told = socket.socket.shutdown, Event()

    def shut_and_linger(connection: socket.socket, how: int) -> None:
        shutdown(connection, how)
        told.wait(5)

    monkeypatch.setattr("socket.socket.shutdown", shut_and_linger)

    def ask() -> None:
        with postgres.connect(within=1) as own:
            own.execute("SET statement_timeout = 0")
            own.execute("SELECT pg_sleep(600)")

    try:
        with pytest.raises(Refusal, match="PostgreSQL has not answered within 1 s"):
            ask()
    finally:
        told.set()


def test_a_server_that_accepts_and_never_answers_costs_no_more_than_the_time_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/nowhere"
        began = monotonic()
        with (
            pytest.raises(Refusal, match="PostgreSQL cannot be used"),
            at(url).connect(within=2),
        ):
            pass
    assert monotonic() - began < 5
