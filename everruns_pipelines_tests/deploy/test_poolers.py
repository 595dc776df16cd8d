"""PgBouncer between us and PostgreSQL: a session of its own works, a shared one is refused."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import run

import psycopg
import pytest

from everruns_pipelines.databases.embedded.servers import ensure_platform_schema
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deploy.services import (
    HOST,
    PostgresServer,
    needs,
    running,
    unprivileged,
)
from everruns_pipelines_tests.deployment import free_port
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import drain_all, materialize

pytestmark = [pytest.mark.deploy, needs("pgbouncer", "pgbouncer")]


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[PostgresServer]:
    """A server whose defaults are not ours."""
    server = PostgresServer(
        place / "data",
        settings={"timezone": "Asia/Kathmandu", "datestyle": "SQL, MDY", "jit": "on"},
    )
    server.initialize()
    with server.started():
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE platform")
        with psycopg.connect(server.url("platform")) as connection:
            ensure_platform_schema(connection)
        yield server


@contextmanager
def pgbouncer(place: Path, server: PostgresServer, **settings: str) -> Generator[str]:
    """Its URL. What people set so that drivers that send options can connect, is set."""
    port = free_port()
    lines = {
        "listen_addr": HOST,
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "any",
        "ignore_startup_parameters": "options,extra_float_digits",
        "pool_mode": "session",
        **settings,
    }
    configuration = place / f"pgbouncer-{port}.ini"
    configuration.write_text(
        "[databases]\n"
        f"* = host={HOST} port={server.port} user=postgres\n"
        "[pgbouncer]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items())
    )
    url = f"postgresql://postgres@{HOST}:{port}/platform"

    def answers() -> bool:
        try:
            with psycopg.connect(url, connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False

    log = place / f"pgbouncer-{port}.log"
    with running(["pgbouncer", str(configuration)], answers, log, user=unprivileged()):
        yield url


def at(url: str) -> PostgresDatabase:
    return PostgresDatabase(Settings.from_environment({"EVERRUNS_POSTGRES_URL": url}))


def refused(url: str) -> Refusal:
    with pytest.raises(Refusal) as raised, at(url).connect():
        pass
    return raised.value


def test_in_session_mode_the_facts_are_right_whatever_the_servers_defaults(
    place: Path, server: PostgresServer
) -> None:
    with pgbouncer(place, server) as url, at(url).connect() as connection:
        shown = connection.execute(
            "SELECT current_setting('timezone'), current_setting('datestyle'),"
            " current_setting('jit')"
        ).fetchone()
        assert shown == ("UTC", "ISO, MDY", "off")
        assert str(connection.info.timezone) == "UTC"
        database.prepare(connection)
        load_adversarial_sources(connection, seed=5, sessions=4)
        assert enqueue(connection, BackfillRequest(limit=10_000))["enqueued"] > 0
        assert drain_all(connection).failed == 0
        materialize(connection)
        assert differences(connection) == []


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_mode_in_which_sessions_share_backends_is_refused(
    place: Path, server: PostgresServer, mode: str
) -> None:
    with pgbouncer(place, server, pool_mode=mode) as url:
        refusal = refused(url)

        assert refusal.code == "incompatible_schema"
        assert "pool_mode = session" in refusal.detail
        # Nothing of ours is left in the backends that others use too.
        with psycopg.connect(url, autocommit=True) as connection:
            assert connection.execute("SHOW timezone").fetchone() == ("Asia/Kathmandu",)


def test_options_of_the_url_that_a_pooler_drops_are_refused(
    place: Path, server: PostgresServer
) -> None:
    with pgbouncer(place, server) as url:
        assert "ALTER ROLE" in refused(f"{url}?options=-c%20search_path%3Delsewhere").detail


def test_a_pool_without_a_second_backend_is_enough(place: Path, server: PostgresServer) -> None:
    with pgbouncer(place, server, default_pool_size="1") as url, at(url).connect() as connection:
        assert connection.execute("SHOW timezone").fetchone() == ("UTC",)


def test_without_a_pooler_nothing_else_is_connected(server: PostgresServer) -> None:
    with at(server.url("platform")).connect() as connection:
        connected = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'everruns_pipelines'"
        ).fetchone()
    assert connected == (1,)


def certificate(place: Path, name: str) -> tuple[Path, Path]:
    """A certificate for `name`, signed by itself: its own authority."""
    key, signed = place / f"{name}.key", place / f"{name}.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative(name)}"]
    run(
        [*command, *subject, "-keyout", str(key), "-out", str(signed)],
        check=True,
        capture_output=True,
    )
    key.chmod(0o644)
    return key, signed


def alternative(name: str) -> str:
    return f"IP:{name}" if name == HOST else f"DNS:{name}"


@pytest.mark.parametrize(
    ("named", "trusted", "told"),
    [
        (HOST, HOST, None),
        ("elsewhere.example", "elsewhere.example", "does not match host name"),
        (HOST, "another.example", "certificate verify failed"),
    ],
)
def test_tls_is_verified_against_an_authority_of_ones_own(
    place: Path, server: PostgresServer, named: str, trusted: str, told: str | None
) -> None:
    """PgBouncer speaks it: the PostgreSQL of the wheel was built without."""
    key, signed = certificate(place, named)
    _, authority = certificate(place, trusted) if trusted != named else (key, signed)
    tls = {
        "client_tls_sslmode": "require",
        "client_tls_key_file": str(key),
        "client_tls_cert_file": str(signed),
    }
    with pgbouncer(place, server, **tls) as url:
        verified = f"{url}?sslmode=verify-full&sslrootcert={authority}"
        if told is None:
            with at(verified).connect() as connection:
                assert connection.pgconn.ssl_in_use
        else:
            refusal = refused(verified)
            assert refusal.code == "unavailable"
            assert told in refusal.detail
