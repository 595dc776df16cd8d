"""The chDB engine behind a loopback socket, with as much of ClickHouse's protocol as is needed.

Faults are injected into the answers to queries that hold a certain text, one per answer, in order.
A number is the code of the error that is answered.
Older engines run in environments of their own, which have nothing but Python: see `older_engine`.
"""

import socket
import ssl
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from email.parser import BytesParser
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from everruns_pipelines.databases.clickhouse import ClickHouseDatabase

Fault = (
    Literal["hang up", "stall", "cut", "error", "error in the middle", "no length", "stranger"]
    | int
)
# What is asked, in which database, and its parameters in the escaped form of ClickHouse.
Answer = Callable[[str, str, Mapping[str, str]], bytes]

READS_SPANS = "dreadnode.outputs"


class HttpEngine(ThreadingHTTPServer):
    """A server on loopback; `faults` come first, `queries` are what was asked, under which `ids`.

    Faults hit the queries that hold the text `faulty`.
    """

    daemon_threads = True

    def __init__(
        self, answer: Answer, certificate: Path | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)
        self.host = f"[{host}]" if ":" in host else host
        self.answer = answer
        self.scheme = "clickhouse"
        if certificate is not None:
            self.scheme = "clickhouses"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.faults: list[Fault] = []
        self.faulty = READS_SPANS
        self.queries: list[str] = []
        self.ids: list[str | None] = []
        self.done = threading.Event()

    @property
    def dsn(self) -> str:
        return f"{self.scheme}://user:secret@{self.host}:{self.server_port}/default"


@contextmanager
def serving(
    clickhouse: "ClickHouseDatabase",
    *,
    profile: Mapping[str, str] | None = None,
    certificate: Path | None = None,
    host: str = "127.0.0.1",
) -> Generator[HttpEngine]:
    """The engine of `clickhouse` as a server, which has it from the first query to its own end.

    Args:
        profile: settings of the user that everybody is.
        certificate: of the server, with its key, in one file; None = without TLS.
        host: the address of loopback where it listens.
    """
    turn = threading.Lock()
    engine = ExitStack()

    @cache
    def opened() -> Any:
        # The parameters come formatted already: below the client, straight to the engine.
        client: Any = vars(engine.enter_context(clickhouse.connect()).client)["_client"]
        for name, value in (profile or {}).items():
            client._backend.set_client_setting(name, value)
        return client

    def answer(query: str, _database: str, bound: Mapping[str, str]) -> bytes:
        with turn:
            client = opened()
            final, _, runtime = client._prep_raw_query_runtime(query, None, None, None, True)
            return client._backend.execute_raw_query(final, dict(bound), None, runtime, None)

    with HttpEngine(answer, certificate, host) as server, engine:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.done.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def engine(self) -> HttpEngine:
        assert isinstance(self.server, HttpEngine)
        return self.server

    def do_GET(self) -> None:
        """`/ping`."""
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"Ok.\n")

    def do_POST(self) -> None:
        sent = dict(parse_qsl(urlsplit(self.path).query))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        form = _form(self.headers["Content-Type"], body)
        # A statement in the URL has its data in the body.
        query = "\n".join(filter(None, (sent.get("query"), form.get("query"))))
        if not form:
            query = "\n".join(filter(None, (query, body.decode())))
        sent |= form
        self.engine.ids.append(sent.get("query_id"))
        self.engine.queries.append(query)
        fault = None
        if self.engine.faulty in query and self.engine.faults:
            fault = self.engine.faults.pop(0)
        if fault == "hang up":
            self.close_connection = True
            return
        bound = {name: value for name, value in sent.items() if name.startswith("param_")}
        waits = sent.get("wait_end_of_query") == "1"
        if fault == "error" or (fault == "error in the middle" and waits):
            self._refuse(b"Code: 241. DB::Exception: made up (MEMORY_LIMIT_EXCEEDED)")
            return
        if isinstance(fault, int):
            self._refuse(f"Code: {fault}. DB::Exception: made up. (MADE_UP)".encode())
            return
        try:
            answer = self.engine.answer(query, sent.get("database", "default"), bound)
        except Exception as error:
            self._refuse(str(error).encode())
            return
        self._send(answer, fault)

    def _refuse(self, message: bytes) -> None:
        code = message.split(b"Code: ", 1)[-1].split(b".")[0]
        self.send_response(500)
        self.send_header("X-ClickHouse-Exception-Code", code.decode() if code.isdigit() else "1")
        self.send_header("Content-Length", str(len(message)))
        self.end_headers()
        self.wfile.write(message)

    def _send(self, answer: bytes, fault: Fault | None) -> None:
        half = answer[: len(answer) // 2]
        self.send_response(200)
        if fault == "stranger":
            answer, half, fault = b"Welcome\n", b"", None
        if fault == "no length":
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(half)
            self.close_connection = True
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "error in the middle":
            half += b"Code: 241. DB::Exception: made up (MEMORY_LIMIT_EXCEEDED)\n"
        self._chunk(half if fault else answer)
        if fault == "stall":
            self.engine.done.wait()
        if fault in ("stall", "cut"):
            self.close_connection = True
            return
        self._chunk(b"")

    def _chunk(self, piece: bytes) -> None:
        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


def _form(content_type: str | None, body: bytes) -> dict[str, str]:
    if content_type is None or "multipart/form-data" not in content_type:
        return {}
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    fields: dict[str, str] = {}
    for part in message.get_payload():
        one: Any = part
        name = one.get_param("name", header="content-disposition")
        fields[name] = one.get_payload(decode=True).decode()
    return fields
