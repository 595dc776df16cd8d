"""Connections to the ClickHouse that holds the spans: a server over HTTP(S), or chDB.

chDB is the ClickHouse engine in this process. It admits one process per directory and one
directory per process, so both are waited for, and given back as soon as the reading is done.
"""

import fcntl
import logging
import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from everruns_pipelines.databases.interruptible import ByteStream, Client, InterruptibleClient
from everruns_pipelines.errors import Refusal, SettingsError
from everruns_pipelines.settings import Settings

# How long a reader waits for the embedded directory, in seconds: longer than any sane read.
DIRECTORY_TIMEOUT = 1800.0
_POLL = 0.1

# A server that sends nothing for this long, in seconds, has stalled.
STALL_TIMEOUT = 300
# What each step of telling a server to give a query up may take, in seconds.
_GIVE_UP_SECONDS = 2.0
ATTEMPTS = 3
PAUSES = (1.0, 5.0)

_CHUNK = 1 << 20

# Its first line tells an answer from any other text at status 200.
_WITH_NAMES = "TabSeparatedWithNames"

# In this process the engine shares our memory: a few megabytes per block instead of 65,409 rows.
# Attributes of megabytes are held once, not also to filter by them (PREWHERE) and to format several
# blocks at once; the indexes skip as many rows as before.
_ENGINE_SETTINGS = {
    "max_threads": 2,
    "max_block_size": 1024,
    "optimize_move_to_prewhere": 0,
    "output_format_parallel_formatting": 0,
}

# What a profile may set to cut an answer in silence, and what we need instead: an error.
_WHOLE_ANSWERS = {
    **dict.fromkeys(
        (
            "read_overflow_mode",
            "read_overflow_mode_leaf",
            "result_overflow_mode",
            "group_by_overflow_mode",
            "sort_overflow_mode",
            "distinct_overflow_mode",
            "set_overflow_mode",
            "join_overflow_mode",
            "transfer_overflow_mode",
            "timeout_overflow_mode",
            "timeout_overflow_mode_leaf",
        ),
        "throw",
    ),
    "skip_unavailable_shards": 0,
    # As numbers: servers of 24.8 fail with a text.
    "limit": 0,
    "offset": 0,
}
_SETTINGS = "\nSETTINGS " + ", ".join(
    f"{name} = {value!r}" for name, value in _WHOLE_ANSWERS.items()
)

# ClickHouse's codes, and what the user is told.
_UNKNOWN_TABLE, _UNKNOWN_DATABASE = 60, 81
_NOT_ALLOWED = {192, 193, 194, 497, 516}  # unknown user, passwords, access denied
_SETTING_IS_FIXED = {164, 452}  # readonly, constraint
# Of the network, of load, memory and quotas, of replicas: another attempt may succeed. Everything
# else is as wrong the next time.
_PASSING = {
    3, 32, 33, 95, 96, 107, 159, 160, 198, 201, 202, 203, 207, 209, 210, 225, 236, 241, 242, 243,
    252, 279, 290, 319, 373, 394, 410, 415, 425, 439, 473, 499, 574, 619, 655, 692, 734, 745, 999,
    1000, 1001, 1002,
}  # fmt: skip
_ESCAPED = re.compile(r"\\(.)")
_UNESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "0": "\0"}

_engine = threading.Lock()
_tell = logging.getLogger(__name__).info
Log = Callable[[str], None]
T = TypeVar("T")


_NO_ANSWER = "what came back is no answer to the query, or it is cut"


class ClickHouseFailure(Exception):
    """ClickHouse refused, stalled, or cut its answer; another attempt may succeed."""


@dataclass(frozen=True)
class ClickHouse:
    """One open connection.

    Args:
        until: when all that is asked must be answered, by the monotonic clock; None for no bound.
        give_up: has the server end the query of this id, which nobody waits for any more.
    """

    client: Client
    is_embedded: bool
    until: float | None = None
    database: str = ""
    version: str = ""
    give_up: Callable[[str], None] = lambda _: None

    def rows(
        self, query: str, parameters: Mapping[str, Any], columns: Sequence[str]
    ) -> list[list[str]]:
        """The rows of a small answer, as text.

        Args:
            columns: what the query calls the columns of its answer. Another one is none of its
                answers.

        Raises:
            ClickHouseFailure: also when the answer is cut, or is no answer to the query.
            Refusal: the query cannot be answered however often it is asked.
        """
        # No error in its midst: the server answers when it is done.
        whole = {"wait_end_of_query": 1}
        with self._answer(query, parameters, _WITH_NAMES, whole) as answer:
            text = answer.read().decode("utf-8", "replace")
        # Not splitlines, which takes U+2028 for the end of a line too.
        *lines, rest = text.split("\n")
        rows = [[_unescaped(value) for value in line.split("\t")] for line in lines]
        if rest or rows[:1] != [list(columns)] or {len(row) for row in rows} != {len(columns)}:
            raise ClickHouseFailure(_NO_ANSWER)
        return rows[1:]

    def stream(
        self, query: str, parameters: Mapping[str, Any], columns: Sequence[str]
    ) -> Iterator[bytes]:
        """The answer as TabSeparated bytes, which are what PostgreSQL's COPY reads.

        It must be read to its end, or closed, before the next query.

        Args:
            columns: as for `rows`.

        Raises:
            ClickHouseFailure: also in the middle, when the answer is cut.
            Refusal: as for `rows`.
        """
        # No network in between: nobody else can answer. And chDB would keep the answer as a whole.
        fmt = "TabSeparated" if self.is_embedded else _WITH_NAMES
        names = b"" if self.is_embedded else "\t".join(columns).encode() + b"\n"
        with self._answer(query, parameters, fmt, {}) as answer:
            head = b""
            while len(head) < len(names) and (piece := answer.read(len(names) - len(head))):
                head += piece
            if head != names:
                raise ClickHouseFailure(_NO_ANSWER)
            while chunk := answer.read(_CHUNK):
                yield chunk

    @contextmanager
    def _answer(
        self,
        query: str,
        parameters: Mapping[str, Any],
        fmt: str,
        settings: dict[str, Any],
    ) -> Generator[ByteStream]:
        # As text: the driver would not even send what it takes for fixed.
        text = query.rstrip() + _SETTINGS
        if self.until is not None:
            left = self._seconds_left(self.until)
            # chDB would give up streaming for a setting beside the text.
            if self.is_embedded:
                text += f", max_execution_time = {left}"
            else:
                settings = {**settings, "max_execution_time": left}
        query_id = str(uuid4())
        if not self.is_embedded:
            settings = {**settings, "query_id": query_id}
        try:
            with _failures():
                answer = self.client.raw_stream(text, dict(parameters), settings, fmt=fmt)
                try:
                    _check_length_is_known(answer)
                    yield answer
                finally:
                    answer.close()
        except Exception:
            raise
        except BaseException:
            # Interrupted, or not read to its end: a server goes on all the same.
            self.give_up(query_id)
            raise

    def _seconds_left(self, until: float) -> int:
        left = math.ceil(until - time.monotonic())
        if left <= 0:
            raise ClickHouseFailure("ClickHouse has not answered in the time allowed")
        return left


@dataclass(frozen=True)
class ClickHouseDatabase:
    """The configured ClickHouse, else the embedded chDB, whose tables are made on first use."""

    settings: Settings

    @contextmanager
    def connect(
        self,
        log: Log = _tell,
        *,
        patience: float = DIRECTORY_TIMEOUT,
        within: float | None = None,
    ) -> Generator[ClickHouse]:
        """An open connection. For chDB the directory is ours, and nobody else's, until the end.

        Args:
            log: told when another process has the directory and we wait.
            patience: how long we wait for it, in seconds.
            within: seconds for connecting and for all that is asked; None for no bound. Of a server
                that has stalled it is known after as many seconds more, at most.

        Raises:
            ClickHouseFailure: the server cannot be reached.
            Refusal: it does not let us in, or the directory stayed taken for too long.
        """
        dsn = self.settings.clickhouse_dsn
        until = None if within is None else time.monotonic() + within
        if dsn is not None and not dsn.get_secret_value().startswith("chdb:"):
            client = _server_client(dsn.get_secret_value(), within)
            with _connected(client, is_embedded=False, until=until) as clickhouse:
                yield replace(clickhouse, give_up=partial(_give_up, dsn.get_secret_value()))
            return
        with (
            _engine_client(self.directory, log, patience) as client,
            _connected(client, is_embedded=True, until=until) as clickhouse,
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
def _connected(client: Client, *, is_embedded: bool, until: float | None) -> Generator[ClickHouse]:
    try:
        yield ClickHouse(client, is_embedded, until, *_server(client))
    finally:
        client.close()


def _server(client: Client) -> tuple[str, str]:
    """The database that we are in, and the server's version, once it grants us whole answers."""
    granted = ", ".join(
        f"getSetting('{name}') = {value!r} AS {name}" for name, value in _WHOLE_ANSWERS.items()
    )
    rows = ClickHouse(client, is_embedded=True).rows(
        f"SELECT currentDatabase() AS database, version() AS version, {granted}",
        {},
        ["database", "version", *_WHOLE_ANSWERS],
    )
    if len(rows) != 1:
        raise ClickHouseFailure(_NO_ANSWER)
    database, version, *is_granted = rows[0]
    cut = [name for name, is_so in zip(_WHOLE_ANSWERS, is_granted, strict=True) if is_so != "1"]
    if cut:
        raise _cuts_answers(f"it sets {', '.join(cut)}, whatever we ask for")
    return database, version


def _cuts_answers(how: str) -> Refusal:
    return Refusal(
        f"The ClickHouse user's settings profile may cut answers: {how}. It must leave "
        "*_overflow_mode at 'throw', and limit, offset and skip_unavailable_shards at 0, "
        "or let us set them",
        code="permission_denied",
        status=503,
    )


def _server_client(dsn: str, within: float | None) -> Client:
    bounds = {"send_receive_timeout": STALL_TIMEOUT}
    if within is not None:
        bounds = {
            "send_receive_timeout": max(1, round(within)),
            "connect_timeout": max(1, round(within / 2)),
        }
    host = urlsplit(dsn).hostname or ""
    with _failures():
        return _client(
            dsn=dsn,
            # The driver forgets the brackets of an IPv6 address.
            host=f"[{host}]" if ":" in host else host,
            # The driver takes no notice of the scheme.
            secure=dsn.startswith("clickhouses://"),
            **bounds,
            # Run ids are many: they go into the body, not into the URL.
            form_encode_query_params=True,
            # One query after the other: no session to keep on the server.
            autogenerate_session_id=False,
        )


def _give_up(dsn: str, query_id: str) -> None:
    """Have the server end a query. Who may read may end what is his own."""
    with suppress(ClickHouseFailure, Refusal), _failures():
        client = _server_client(dsn, _GIVE_UP_SECONDS)
        try:
            client.command(f"KILL QUERY WHERE query_id = '{query_id}' ASYNC")
        finally:
            client.close()


@contextmanager
def _engine_client(directory: Path, log: Log, patience: float) -> Generator[Client]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        directory.with_name(directory.name + ".lock").open("w") as lock,
        _sole_use(directory, lock, log, patience),
    ):
        try:
            with _failures():
                client = InterruptibleClient(
                    lambda: _client(dsn=f"chdb://{directory}", settings=dict(_ENGINE_SETTINGS))
                )
        except ImportError:
            raise SettingsError(
                "The embedded ClickHouse is not installed: set EVERRUNS_CLICKHOUSE_DSN to a "
                "server's, or install everruns_pipelines[embedded]"
            ) from None
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


def _check_length_is_known(answer: ByteStream) -> None:
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
        if error.code in _SETTING_IS_FIXED:
            raise _cuts_answers(_first_line(error)) from None
        if error.code is not None and error.code not in _PASSING:
            raise Refusal(
                f"ClickHouse cannot answer: {_first_line(error)}",
                code="incompatible_schema",
                status=503,
            ) from None
        raise _as_failure(error) from error
    except (ClickHouseError, HTTPError, OSError) as error:
        raise _as_failure(error) from error


def _as_failure(error: Exception) -> Exception:
    """What is worth another attempt, unless the server is a stranger."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return ClickHouseFailure(f"ClickHouse failed: {_first_line(error)}")
    return Refusal(
        f"The certificate of ClickHouse is not trusted: {cause.verify_message}. "
        "SSL_CERT_FILE may name a file with the authority that signed it",
        code="unavailable",
        status=503,
    )


def _unescaped(value: str) -> str:
    return _ESCAPED.sub(lambda found: _UNESCAPED.get(found[1], found[1]), value)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
