"""Whom alerts are told: a web server on this machine."""

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Receiver:
    """Takes messages over HTTP, and refuses them while `status` is not 200."""

    def __init__(self, password: str) -> None:
        self.password = password
        self.got: list[dict[str, Any]] = []
        self.status = 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.status == 200:
                    receiver.got.append(json.loads(body))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @classmethod
    @contextmanager
    def listening(cls, password: str = "nobody's") -> Generator[Self]:
        receiver = cls(password)
        try:
            yield receiver
        finally:
            receiver.server.shutdown()
            receiver.server.server_close()

    @property
    def url(self) -> str:
        return f"json://user:{self.password}@127.0.0.1:{self.server.server_port}/hook"

    def news(self) -> list[dict[str, Any]]:
        """What came since the last call."""
        got, self.got = self.got, []
        return got
