"""`dev`: Dagster's UI and daemon on this machine."""

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime

from everruns_pipelines.commands.arguments import add_address, refuse_address
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal, RunFailure
from everruns_pipelines.settings import Settings

HELP = "start Dagster's UI and daemon on this machine"

# Held in Dagster's storage: there is to be one daemon, so that each sensor ticks once.
_DAEMON_LOCK = 0x6576_7270_6461_656D
# Every opening of the embedded ClickHouse leaves seven files open, and the items' sensor opens it
# every minute: shells allow 1,024.
_OPEN_FILES = 100_000
# A daemon tells every 30 s that it lives.
_HEARTBEAT_SECONDS = 45


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dev` takes."""
    add_address(parser)


def run(options: argparse.Namespace, settings: Settings) -> None:
    """Start both, and end them at the first signal.

    Raises:
        Refusal: the port cannot be bound, or another daemon works on the same storage.
        RunFailure: Dagster ended by itself.
    """
    from everruns_pipelines.orchestration.home import dagster_home

    refuse_address(options.host, options.port)
    home = dagster_home(settings)
    with _only_daemon(settings):
        status = _run_dagster(
            ["--host", options.host, "--port", str(options.port)],
            cwd=str(home),
            env={
                **os.environ,
                "DAGSTER_HOME": str(home),
                "EVERRUNS_HOME": str(settings.home.absolute()),
            },
        )
    if status:
        raise RunFailure(f"Dagster ended with status {status}")


def _run_dagster(arguments: list[str], *, cwd: str, env: dict[str, str]) -> int:
    """Run the guarded web server and the daemon until they end; what they ended with.

    Started in the background by a shell, this process ignores SIGINT, and Dagster would ignore both
    signals: so both are set here, and passed on as the one that Dagster heeds.
    """

    def interrupt(*_: object) -> None:
        dagster.send_signal(signal.SIGINT)

    _allow_open_files()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for the child
    dagster = subprocess.Popen(
        [sys.executable, "-m", "everruns_pipelines.serve.with_daemon", *arguments],
        cwd=cwd,
        env=env,
        start_new_session=True,  # a terminal would interrupt it once more
    )
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, interrupt)
    return dagster.wait()


def _allow_open_files() -> None:
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


@contextmanager
def _only_daemon(settings: Settings) -> Generator[None]:
    """Be the one daemon of Dagster's storage.

    Raises:
        Refusal: there is one already, or the storage cannot be reached.
    """
    import psycopg

    from everruns_pipelines.dagster_storage import storage_url, unreachable

    try:
        opened = psycopg.connect(storage_url(settings), autocommit=True, connect_timeout=10)
    except psycopg.OperationalError:
        raise unreachable() from None
    with opened as connection:
        row = connection.execute("SELECT pg_try_advisory_lock(%s)", [_DAEMON_LOCK]).fetchone()
        if row != (True,) or _beats(connection):
            raise Refusal(
                "Another daemon works on the same storage of Dagster, and there is to be one. "
                "Stop it, or set EVERRUNS_HOME or EVERRUNS_DAGSTER_POSTGRES_URL to another",
                code="locked",
                status=409,
            )
        yield
        if not connection.closed:
            # So that the next one need not wait to see whether this one lives.
            connection.execute("DELETE FROM daemon_heartbeats")


def _beats(connection: Connection) -> bool:
    """Does a daemon live that `dev` has not started? One that was killed looks alike for as long as
    its last heartbeat is young: the next one tells.
    """
    first = _last_heartbeat(connection)
    if first is not None:
        sys.stderr.write("everruns-pipelines: looking whether another daemon is alive\n")
    while (last := _last_heartbeat(connection)) is not None:
        if last != first:
            return True
        _pause()
    return False


def _pause() -> None:
    time.sleep(1)


def _last_heartbeat(connection: Connection) -> datetime | None:
    """When a daemon last told that it lives; None if that is long ago."""
    if connection.execute("SELECT to_regclass('daemon_heartbeats')").fetchone() == (None,):
        return None
    row = connection.execute(
        "SELECT max(timestamp) FROM daemon_heartbeats"
        " WHERE timestamp > now() AT TIME ZONE 'UTC' - make_interval(secs => %s)",
        [_HEARTBEAT_SECONDS],
    ).fetchone()
    return None if row is None else row[0]
