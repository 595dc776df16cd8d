"""The directory of chDB that one process may have at a time, and what a server can do wrong."""

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure, retrying
from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.databases.http_engine import serving
from everruns_pipelines_tests.deployment import until


def _resource(directory: Path) -> ClickHouseDatabase:
    settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": f"chdb://{directory}"})
    return ClickHouseDatabase(settings)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "engine"
    made.mkdir()
    return made


_TABLES = "SELECT name FROM system.tables WHERE database = currentDatabase()"

_HOLD = """
import sys
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.settings import Settings
settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": "chdb://" + sys.argv[1]})
with ClickHouseDatabase(settings).connect():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is reading the directory until it is told to stop."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_reader_waits_for_another_process_and_says_so(
    directory: Path, holder: subprocess.Popen[str]
) -> None:
    told: list[str] = []

    def tell(message: str) -> None:
        told.append(message)
        assert holder.stdin is not None
        holder.stdin.write("stop\n")
        holder.stdin.flush()

    with _resource(directory).connect(tell) as clickhouse:
        assert clickhouse.rows("SELECT 1 AS n", {}, ["n"]) == [["1"]]
    assert len(told) == 1
    assert "another run is reading" in told[0]


@pytest.mark.usefixtures("holder")
def test_a_reader_gives_up_after_its_patience(directory: Path) -> None:
    with (
        pytest.raises(Refusal, match="Let it finish") as raised,
        _resource(directory).connect(patience=0.01),
    ):
        pass
    assert raised.value.code == "locked"


def test_a_killed_holder_leaves_the_directory_free(
    directory: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    with _resource(directory).connect() as clickhouse:
        assert clickhouse.rows("SELECT 1 AS n", {}, ["n"]) == [["1"]]


def test_threads_and_directories_of_one_process_take_turns(tmp_path: Path) -> None:
    answers: list[str] = []

    def read(name: str) -> None:
        with _resource(tmp_path / name).connect() as clickhouse:
            answers.append(clickhouse.rows("SELECT 1 AS n", {}, ["n"])[0][0])

    threads = [threading.Thread(target=read, args=[name]) for name in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["1"] * 4


def test_the_embedded_default_makes_its_tables(tmp_path: Path) -> None:
    settings = Settings.from_environment({"EVERRUNS_HOME": str(tmp_path)})
    tables: list[list[str]] = []
    for _ in range(2):
        with ClickHouseDatabase(settings).connect() as clickhouse:
            tables = clickhouse.rows(_TABLES, {}, ["name"])
    assert ["otel_traces"] in tables
    assert ["otel_traces_trace_id_ts"] in tables


def test_a_directory_of_the_users_is_not_written(directory: Path) -> None:
    with _resource(directory).connect() as clickhouse:
        assert clickhouse.rows(_TABLES, {}, ["name"]) == []


def test_rows_end_at_a_newline_alone(directory: Path) -> None:
    odd = "a\u0085b\u2028c\u2029d\x0b\x0c\x1c\r"
    with _resource(directory).connect() as clickhouse:
        query = "SELECT {odd:String} AS odd, number AS n FROM numbers(2)"
        assert clickhouse.rows(query, {"odd": odd}, ["odd", "n"]) == [[odd, "0"], [odd, "1"]]
        assert clickhouse.rows("SELECT 1 AS n WHERE 0", {}, ["n"]) == []
        assert clickhouse.rows("SELECT '' AS n", {}, ["n"]) == [[""]]


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dsn = f"clickhouse://user:secret@127.0.0.1:{unused.getsockname()[1]}/default"
        settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": dsn})
        with pytest.raises(ClickHouseFailure) as raised, ClickHouseDatabase(settings).connect():
            pass
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "is_tls"), [("clickhouses", True), ("clickhouse", False)])
def test_credentials_go_over_tls_where_the_scheme_says_so(scheme: str, is_tls: bool) -> None:
    heard: list[bytes] = []

    def listen(listener: socket.socket) -> None:
        # The driver tries once more.
        for _ in range(2):
            caller, _ = listener.accept()
            with caller:
                heard.append(caller.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, args=[listener], daemon=True)
        thread.start()
        dsn = f"{scheme}://user:hunter2@127.0.0.1:{listener.getsockname()[1]}/default"
        settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": dsn})
        with pytest.raises(ClickHouseFailure), ClickHouseDatabase(settings).connect():
            pass
        thread.join(10)
    credentials = base64.b64encode(b"user:hunter2")
    assert heard
    for said in heard:
        assert said.startswith(b"\x16") == is_tls  # a TLS handshake
        assert (credentials in said) != is_tls


def test_a_server_over_tls_is_expected_at_its_own_port() -> None:
    settings = Settings.from_environment(
        {"EVERRUNS_CLICKHOUSE_DSN": "clickhouses://user:secret@127.0.0.1/default"}
    )
    with (
        pytest.raises(ClickHouseFailure, match="8443"),
        ClickHouseDatabase(settings).connect(),
    ):
        pass


def test_attempts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everruns_pipelines.databases.clickhouse.PAUSES", (0.0, 0.0))
    told: list[str] = []
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise ClickHouseFailure("made up")

    with pytest.raises(ClickHouseFailure, match="made up"):
        retrying(fail, told.append)
    assert (len(tries), len(told)) == (3, 2)


_LONG = "SELECT count() AS rows FROM numbers(30000000000) WHERE cityHash64(number) = 1"


def test_a_query_of_the_embedded_engine_ends_when_it_is_interrupted(directory: Path) -> None:
    clickhouse = _resource(directory)
    with clickhouse.connect() as opened:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            opened.rows(_LONG, {}, ["rows"])
    with clickhouse.connect() as opened:
        assert opened.rows("SELECT 1 AS one", {}, ["one"]) == [["1"]]


def test_a_query_of_the_embedded_engine_ends_when_its_time_is_over(directory: Path) -> None:
    with _resource(directory).connect(within=1) as opened:
        for expected in ("Timeout exceeded", "not answered in the time allowed"):
            with pytest.raises(ClickHouseFailure, match=expected):
                opened.rows(_LONG, {}, ["rows"])


def test_a_server_may_be_named_by_an_ipv6_address(directory: Path) -> None:
    with serving(_resource(directory), host="::1") as server:
        assert "@[::1]:" in server.dsn
        settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": server.dsn})
        with ClickHouseDatabase(settings).connect() as clickhouse:
            assert clickhouse.rows("SELECT 1 AS one", {}, ["one"]) == [["1"]]


def test_an_embedded_engine_that_is_not_installed_is_said_in_one_line(directory: Path) -> None:
    without = "import sys; sys.modules['chdb'] = None\n"  # in a process that has not imported it
    held = subprocess.run(
        [sys.executable, "-c", without + _HOLD, str(directory)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert held.returncode == 1
    assert "SettingsError: The embedded ClickHouse is not installed: set EVERRUNS_" in held.stderr


def test_a_server_is_told_to_end_a_query_whose_reader_was_interrupted(directory: Path) -> None:
    with serving(_resource(directory)) as server:
        server.faults.append("stall")
        server.faulty = "'long'"
        settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": server.dsn})

        def asked() -> list[str | None]:
            return [
                id_
                for id_, query in zip(server.ids, server.queries, strict=False)
                if "'long'" in query
            ]

        def interrupt() -> None:
            until(lambda: bool(asked()), "the query has arrived")
            os.kill(os.getpid(), signal.SIGINT)

        with ClickHouseDatabase(settings).connect() as clickhouse:
            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                clickhouse.rows("SELECT 'long' AS n", {}, ["n"])
        [query_id] = asked()
        assert server.queries[-1] == f"KILL QUERY WHERE query_id = '{query_id}' ASYNC"
