"""The web server: Dagster's own application and, beside it, the platform's two calls, metrics and
probes, behind one guard.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dagster_webserver.app import (
    create_app_from_workspace_process_context,  # pyright: ignore[reportUnknownVariableType]
)
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from everruns_pipelines.errors import Refusal
from everruns_pipelines.serve.answers import answer, refused
from everruns_pipelines.serve.api import Api
from everruns_pipelines.serve.graphql import judge_graphql
from everruns_pipelines.serve.guards import Guard, name_of, origin_of
from everruns_pipelines.serve.metrics import Metrics
from everruns_pipelines.serve.openapi import document
from everruns_pipelines.serve.runs import ProcessContext, Runs
from everruns_pipelines.serve.tokens import METRICS_READ, TokenFile
from everruns_pipelines.settings import Settings

_LOCAL = ("localhost", "127.0.0.1", "::1")
# What Dagster's application is not asked for.
_OURS = {"v1", "api", "metrics", "healthz", "readyz"}
_POLL_MILLISECONDS = 2000
_METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
_logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Address:
    """Where the server is.

    Args:
        prefix: the path below which everything is served, such as `/x`; empty for none.
    """

    host: str
    port: int
    prefix: str = ""


def create_app(
    context: ProcessContext, settings: Settings, address: Address, *, read_only: bool
) -> ASGIApp:
    """The whole application.

    Raises:
        SettingsError: the file of the tokens cannot be read.
    """
    tokens = TokenFile(settings.api_tokens)
    metrics = Metrics(settings, context)
    prefix = address.prefix
    pages = settings.public_url or f"http://{address.host}:{address.port}{prefix}"
    api = Api(
        settings, tokens, Runs(context), metrics, prefix, pages.rstrip("/"), read_only=read_only
    )
    ours = Starlette(
        routes=[
            *api.routes(),
            Route(f"{prefix}/api/openapi.json", _constant(document(settings, prefix))),
            Route(f"{prefix}/metrics", _metrics(api, metrics)),
            Route(f"{prefix}/healthz", _constant({"status": "ok"})),
            Route(f"{prefix}/readyz", _readiness(context)),
        ],
        exception_handlers={HTTPException: _not_here},
    )
    dagsters = create_app_from_workspace_process_context(context, prefix, _POLL_MILLISECONDS)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_ours = scope["type"] == "http" and _first_step(scope["path"], prefix) in _OURS
        await (ours if is_ours else dagsters)(scope, receive, send)

    return Guard(
        app,
        hosts=_hosts(settings, address),
        origins=frozenset(() if settings.public_url is None else (origin_of(settings.public_url),)),
        open_paths=frozenset({f"{prefix}/healthz", f"{prefix}/readyz"}),
        judge=_judge(tokens, f"{prefix}/graphql"),
    )


def _first_step(path: str, prefix: str) -> str:
    """What comes first below the prefix."""
    return path.removeprefix(prefix).lstrip("/").partition("/")[0]


def _hosts(settings: Settings, address: Address) -> frozenset[str]:
    told = [name.strip() for name in (settings.allowed_hosts or "").split(",")]
    if settings.public_url is not None:
        told.append(origin_of(settings.public_url).partition("://")[2])
    names = (name_of(host) for host in (*told, address.host) if host)
    return frozenset((*_LOCAL, *(name for name in names if name is not None)))


def _judge(tokens: TokenFile, graphql: str) -> Callable[[Scope, Headers, bytes], None]:
    def judge(scope: Scope, headers: Headers, body: bytes) -> None:
        if scope["path"].rstrip("/") == graphql:
            judge_graphql(tokens, scope, headers, body)

    return judge


def _constant(content: dict[str, object]) -> Endpoint:
    async def endpoint(_: Request) -> Response:
        return answer(content)

    return endpoint


def _metrics(api: Api, metrics: Metrics) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        try:
            api.authorize(request, METRICS_READ)
        except Refusal as refusal:
            return refused(refusal, request.url.path)
        return Response(await run_in_threadpool(metrics.text), media_type=_METRICS_TYPE)

    return endpoint


def _readiness(context: ProcessContext) -> Endpoint:
    def look() -> None:
        try:
            context.instance.get_daemon_heartbeats()
        except Exception as error:
            _logger.warning("Dagster's storage does not answer (%s)", type(error).__name__)
            raise _not_ready("Dagster's storage does not answer") from None
        with context.create_request_context() as workspace:
            entries = workspace.get_code_location_entries().values()
        if not entries or any(one.load_error or not one.code_location for one in entries):
            raise _not_ready("The code location is not loaded")

    async def endpoint(request: Request) -> Response:
        try:
            await run_in_threadpool(look)
        except Refusal as refusal:
            return refused(refusal, request.url.path)
        return answer({"status": "ok"})

    return endpoint


def _not_ready(detail: str) -> Refusal:
    return Refusal(detail, code="unavailable", status=503)


async def _not_here(request: Request, error: Exception) -> Response:
    """What Starlette says of a path or a method that is none of ours, in our own forms."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "none")
        refusal = Refusal(
            f"Not a method of this path; allowed: {allowed}",
            code="method_not_allowed",
            status=405,
        )
    else:
        refusal = Refusal("There is nothing at this path", code="not_found_error", status=404)
    return refused(refusal, request.url.path, headers=error.headers)
