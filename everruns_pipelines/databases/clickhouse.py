"""Connections to the ClickHouse that holds the spans: a server over HTTP(S), or chDB.

chDB is the ClickHouse engine in this process. It admits one process per directory and one
directory per process, so both are waited for, and given back as soon as the reading is done.
"""

import fcntl
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings

# How long a reader waits for the embedded directory, in seconds: longer than any sane read.
DIRECTORY_TIMEOUT = 1800.0
_POLL = 0.1

# A server that sends nothing for this long, in seconds, has stalled.
STALL_TIMEOUT = 300
ATTEMPTS = 3
PAUSES = (1.0, 5.0)

_CHUNK = 1 << 20

# In this process the engine shares our memory: a few megabytes per block instead of 65,409 rows.
# Attributes of megabytes are held once, not also to filter by them (PREWHERE) and to format several
# blocks at once; the indexes skip as many rows as before.
_ENGINE_SETTINGS = {
    "max_threads": 2,
    "max_block_size": 1024,
    "optimize_move_to_prewhere": 0,
    "output_format_parallel_formatting": 0,
}

# ClickHouse's codes for what a second attempt cannot change, and what the user is told.
_UNKNOWN_TABLE, _UNKNOWN_DATABASE = 60, 81
_NOT_ALLOWED = {192, 193, 194, 497, 516}  # unknown user, passwords, access denied

_engine = threading.Lock()
_tell = logging.getLogger(__name__).info
Log = Callable[[str], None]
T = TypeVar("T")


class ClickHouseFailure(Exception):
    """ClickHouse refused, stalled, or cut its answer; another attempt may succeed."""


class _ByteStream(Protocol):
    def read(self, size: int | None = ..., /) -> bytes: ...
    def close(self) -> None: ...


class Client(Protocol):
    """What of clickhouse-connect's client we use."""

    def command(self, cmd: str, /) -> Any:
        """Run a statement without rows, or with one value."""

    def raw_stream(
        self,
        query: str,
        /,
        parameters: dict[str, Any],
        settings: dict[str, Any] | None = None,
        *,
        fmt: str,
    ) -> _ByteStream:
        """The answer piece by piece, as the server formats it."""
        ...

    def raw_insert(self, table: str, /, *, insert_block: bytes, fmt: str) -> Any:
        """Insert rows that are formatted already."""

    def close(self) -> None:
        """End the connection."""


@dataclass(frozen=True)
class ClickHouse:
    """One open connection."""

    client: Client
    database: str

    def rows(self, query: str, parameters: Mapping[str, Any]) -> list[list[str]]:
        """The rows of a small answer, as text.

        Raises:
            ClickHouseFailure: also when the answer is cut.
            Refusal: the table does not exist or must not be read.
        """
        # No error in its midst: the server answers when it is done.
        whole = {"wait_end_of_query": 1}
        with self._answer(query, parameters, "TabSeparatedRaw", whole) as answer:
            text = answer.read().decode("utf-8", "replace")
        # Not splitlines, which takes U+2028 for the end of a line too.
        return [line.split("\t") for line in text.split("\n")[:-1]]

    def stream(self, query: str, parameters: Mapping[str, Any]) -> Iterator[bytes]:
        """The answer as TabSeparated bytes, which are what PostgreSQL's COPY reads.

        It must be read to its end, or closed, before the next query.

        Raises:
            ClickHouseFailure: also in the middle, when the answer is cut.
        """
        with self._answer(query, parameters, "TabSeparated", {}) as answer:
            while chunk := answer.read(_CHUNK):
                yield chunk

    @contextmanager
    def _answer(
        self,
        query: str,
        parameters: Mapping[str, Any],
        fmt: str,
        settings: dict[str, Any],
    ) -> Generator[_ByteStream]:
        with _failures():
            answer = self.client.raw_stream(query, dict(parameters), settings, fmt=fmt)
            try:
                _check_length_is_known(answer)
                yield answer
            finally:
                answer.close()


@dataclass(frozen=True)
class ClickHouseDatabase:
    """The configured ClickHouse, else the embedded chDB, whose tables are made on first use."""

    settings: Settings

    @contextmanager
    def connect(
        self, log: Log = _tell, *, patience: float = DIRECTORY_TIMEOUT
    ) -> Generator[ClickHouse]:
        """An open connection. For chDB the directory is ours, and nobody else's, until the end.

        Args:
            log: told when another process has the directory and we wait.
            patience: how long we wait for it, in seconds.

        Raises:
            ClickHouseFailure: the server cannot be reached.
            Refusal: it does not let us in, or the directory stayed taken for too long.
        """
        dsn = self.settings.clickhouse_dsn
        if dsn is not None and not dsn.get_secret_value().startswith("chdb:"):
            with _connected(_server_client(dsn.get_secret_value())) as clickhouse:
                yield clickhouse
            return
        with (
            _engine_client(self.directory, log, patience) as client,
            _connected(client) as clickhouse,
        ):
            if dsn is None:
                from everruns_pipelines.databases.embedded.clickhouse import span_tables

                for statement in span_tables():
                    client.command(statement)
            yield clickhouse

    def is_there(self) -> bool:
        """False while the embedded chDB has never been used: then there are no spans."""
        return self.settings.clickhouse_dsn is not None or self.directory.exists()

    @property
    def directory(self) -> Path:
        """Where chDB's data lies."""
        dsn = self.settings.clickhouse_dsn
        if dsn is None:
            return self.settings.home.resolve() / "clickhouse"
        return Path(dsn.get_secret_value().removeprefix("chdb://")).resolve()


def retrying(action: Callable[[], T], log: Log) -> T:
    """What `action` returns, after at most `ATTEMPTS` tries. It must leave nothing half-done.

    Raises:
        ClickHouseFailure: the last try failed too.
    """
    for attempt, pause in enumerate(PAUSES, start=1):
        try:
            return action()
        except ClickHouseFailure as failure:
            log(f"Attempt {attempt} of {ATTEMPTS}: {failure}. Trying again in {pause:g} s")
            time.sleep(pause)
    return action()


@contextmanager
def _connected(client: Client) -> Generator[ClickHouse]:
    try:
        [[database]] = ClickHouse(client, "").rows("SELECT currentDatabase()", {})
        yield ClickHouse(client, database)
    finally:
        client.close()


def _server_client(dsn: str) -> Client:
    with _failures():
        return _client(
            dsn=dsn,
            # The driver takes no notice of the scheme.
            secure=dsn.startswith("clickhouses://"),
            send_receive_timeout=STALL_TIMEOUT,
            # Run ids are many: they go into the body, not into the URL.
            form_encode_query_params=True,
            # One query after the other: no session to keep on the server.
            autogenerate_session_id=False,
        )


@contextmanager
def _engine_client(directory: Path, log: Log, patience: float) -> Generator[Client]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        directory.with_name(directory.name + ".lock").open("w") as lock,
        _sole_use(directory, lock, log, patience),
    ):
        with _failures():
            client = _client(dsn=f"chdb://{directory}", settings=dict(_ENGINE_SETTINGS))
        yield client


def _client(**options: Any) -> Client:
    from clickhouse_connect import (
        get_client,  # pyright: ignore[reportUnknownVariableType]
    )

    client: Any = get_client(**options)
    return client


@contextmanager
def _sole_use(directory: Path, lock: IO[str], log: Log, patience: float) -> Generator[None]:
    """Wait until no thread of this process uses chDB, and no other process this directory."""
    deadline = time.monotonic() + patience
    busy = f"another run is reading the embedded ClickHouse in {directory}"
    if not _engine.acquire(blocking=False):
        log(f"Waiting: {busy}")
        if not _engine.acquire(timeout=patience):
            raise _still_busy(busy, patience)
    try:
        told = False
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise _still_busy(busy, patience)
            if not told:
                log(f"Waiting: {busy}")
                told = True
            time.sleep(_POLL)
        yield
    finally:
        _engine.release()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _still_busy(busy: str, patience: float) -> Refusal:
    return Refusal(
        f"{busy}, for {patience:g} s now. Let it finish, or end it, and try again",
        code="locked",
        status=409,
    )


def _check_length_is_known(answer: _ByteStream) -> None:
    """Only an answer that says where it ends shows that it was cut."""
    headers: Mapping[str, str] | None = getattr(answer, "headers", None)
    if headers is None:  # chDB: no network between
        return
    if "chunked" not in headers.get("Transfer-Encoding", "") and "Content-Length" not in headers:
        raise ClickHouseFailure("the answer has no length: it could be cut and nobody would know")


@contextmanager
def _failures() -> Generator[None]:
    """What the driver and the network raise, as what it means for the caller."""
    from clickhouse_connect.driver.exceptions import ClickHouseError
    from clickhouse_connect.driver.exceptions import Error as DriverError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except DriverError as error:
        if error.code in (_UNKNOWN_TABLE, _UNKNOWN_DATABASE):
            raise Refusal(
                f"ClickHouse has no such table or database: {_first_line(error)}. "
                "EVERRUNS_CLICKHOUSE_DSN and EVERRUNS_SPANS_TABLE must name the span table",
                code="incompatible_schema",
                status=503,
            ) from None
        if error.code in _NOT_ALLOWED:
            raise Refusal(
                f"ClickHouse refuses access: {_first_line(error)}",
                code="permission_denied",
                status=503,
            ) from None
        raise ClickHouseFailure(f"ClickHouse failed: {_first_line(error)}") from error
    except (ClickHouseError, HTTPError, OSError) as error:
        raise ClickHouseFailure(f"ClickHouse failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
