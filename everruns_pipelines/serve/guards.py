"""What stands before every request: which hosts, whose pages, how large, how long.

Dagster's web server answers any `Host`, mutations by GET, and WebSockets of any page: whoever makes
an operator's browser open a page can launch runs. Here that ends, and every answer tells the
browser what may be done with it. See docs/security.md.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everruns_pipelines.errors import Refusal
from everruns_pipelines.serve.answers import refused

LARGEST_BODY = 2**20  # bytes
BODY_SECONDS = 30.0

_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_access = logging.getLogger("everruns_pipelines.access")

# Dagster's own policy says which scripts may run; this is what it leaves open.
_PAGES = (
    "default-src 'self'; connect-src 'self'; img-src 'self' data: blob:; font-src 'self' data:;"
    " worker-src 'self' blob:; form-action 'self'; frame-src 'none'; frame-ancestors 'none'"
)
# The GraphQL playground comes without a policy, and with a script of its own.
_PLAYGROUND = (
    f"{_PAGES}; base-uri 'none'; object-src 'none'; script-src 'self' 'unsafe-inline';"
    " style-src 'self' 'unsafe-inline'"
)
_OTHERS = "default-src 'self'; frame-ancestors 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}

# Judges a request of Dagster's GraphQL by scope, headers and body.
Judge = Callable[[Scope, Headers, bytes], None]


@dataclass(frozen=True)
class Guard:
    """An ASGI application that lets through to another what may pass.

    Args:
        hosts: the names under which it answers, in lower case.
        origins: origins that are ours beside that of the request's own `Host`.
        open_paths: answered under any name: they tell nothing.
        judge: refuses what else must not pass.
    """

    app: ASGIApp
    hosts: frozenset[str]
    origins: frozenset[str]
    open_paths: frozenset[str]
    judge: Judge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge a request, and pass it on."""
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case _:
                await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        status = 0

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _secure(MutableHeaders(scope=message))
            await send(message)

        try:
            try:
                headers = Headers(scope=scope)
                _judge_path(scope["path"])
                self._judge_origin(scope, headers)
                body = await _read(headers, receive)
                self.judge(scope, headers, body)
            except Refusal as refusal:
                await refused(refusal, scope["path"])(scope, receive, guarded_send)
                return
            await self.app(scope, _again(body, receive), guarded_send)
        finally:
            _log(scope, status, time.perf_counter() - started)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            _judge_path(scope["path"])
            self._judge_origin(scope, headers)
            self.judge(scope, headers, b"")
        except Refusal as refusal:
            _log(scope, refusal.status, 0.0)
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refusal.code})
            return
        _log(scope, 101, 0.0)
        await self.app(scope, receive, send)

    def _judge_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse a name that is not ours, and what another site's page asks for."""
        if scope["path"] in self.open_paths:
            return
        hosts = headers.getlist("host")
        if len(hosts) != 1 or name_of(hosts[0]) not in self.hosts:
            raise Refusal(
                "Host: not a name of this server: EVERRUNS_ALLOWED_HOSTS lists them",
                code="forbidden",
                status=403,
            )
        if scope["type"] == "http" and scope["method"] in _SAFE_METHODS:
            return
        site = headers.get("sec-fetch-site", "none")
        own = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}", *self.origins}
        foreign = [origin for origin in headers.getlist("origin") if origin.lower() not in own]
        if foreign or site not in ("none", "same-origin"):
            raise Refusal("Origin: a page of another site asks", code="forbidden", status=403)


def _judge_path(path: str) -> None:
    """Refuse what a proxy, which tidies paths before it decides, takes for another path."""
    steps = path.split("/")
    if {".", ".."} & set(steps) or "" in steps[1:-1]:
        raise Refusal("The path has a step that is empty or of dots")


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, as a browser tells them."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def name_of(host: str) -> str | None:
    """The name in a `Host` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _read(headers: Headers, receive: Receive) -> bytes:
    """The whole body: bounded in size, and in the time that it may take to arrive."""
    if int(headers.get("content-length", "0")) > LARGEST_BODY:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal("The client has gone", code="request_timeout", status=408)
                body += message.get("body", b"")
                if len(body) > LARGEST_BODY:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(
            f"The body must arrive within {BODY_SECONDS:g} s", code="request_timeout", status=408
        ) from None


def _too_large() -> Refusal:
    return Refusal(f"A body has at most {LARGEST_BODY} bytes", code="payload_too_large", status=413)


def _again(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body that was read, then what comes after it."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _secure(headers: MutableHeaders) -> None:
    is_page = headers.get("content-type", "").startswith("text/html")
    own = headers.get("content-security-policy")
    if not is_page:
        policy = _OTHERS
    elif own is None:
        policy = _PLAYGROUND
    else:
        policy = f"{own.strip().rstrip(';')}; {_PAGES}"
    headers["Content-Security-Policy"] = policy
    for name, value in _HEADERS.items():
        headers[name] = value


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line per request: no query string and no header, since tokens may stand there."""
    client = scope["client"][0] if scope.get("client") else "-"
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
    method = scope.get("method", "WEBSOCKET")
    _access.info("%s %s %s %d %.3fs", client, method, path, status, seconds)
