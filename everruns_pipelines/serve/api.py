"""The platform's own two calls: parse, authorize, launch, follow, shape the answer.

What a value may be, and what a refusal says, is the domain's: here is no second copy of a rule.
"""

import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import psycopg
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from everruns_pipelines.databases.postgres import ItemsPostgresDatabase, PostgresDatabase
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.items.database import check_platform
from everruns_pipelines.items.scope import RebuildRequest, as_uuid, hold_to, resolve_project
from everruns_pipelines.reporting.backfill import BackfillRequest, check
from everruns_pipelines.serve.answers import answer, refused
from everruns_pipelines.serve.graphql import bearer_token, media_type
from everruns_pipelines.serve.metrics import Metrics
from everruns_pipelines.serve.runs import TOKEN_TAG, Runs, Wanted
from everruns_pipelines.serve.tokens import ITEMS_ADMIN, REPORTS_ADMIN, Grant, TokenFile
from everruns_pipelines.settings import Part, Settings

# How long a request may wait for its run.
ANSWER_SECONDS = 300
# How long one is looked for that is asked after: long enough to find that it has ended.
_GLANCE_SECONDS = 1
_ASK_AGAIN = "2"
_LONGEST_NAME = 64
_MOST_TOLD = 10

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_Body = TypeVar("_Body", bound=BaseModel)
_logger = logging.getLogger(__name__)


class BackfillBody(BaseModel):
    """What to backfill; without a body, as much as by default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    limit: int | None = Field(
        None, description="the most outbox rows to enqueue, from 1 to 10000; 1000 if not given"
    )


class RebuildBody(BaseModel):
    """Whose items to rebuild: those of a session, of some runs, or of both together."""

    model_config = ConfigDict(extra="forbid", strict=True)

    session_id: str | None = Field(None, description="a UUID")
    run_ids: list[str] | None = Field(
        None, description="values of dreadnode.run.id, or trace ids as 32 hex digits"
    )


Ops = dict[str, dict[str, Any]]
Counts = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Call:
    """One call of the platform's API.

    Args:
        path: below `/v1`, with the names of what stands in it.
        plan: what the job's ops are given; refuses what the domain refuses, before any run.
        is_about: whether a run is one of this call, for the same path and the same holder.
        result: the API's result, out of what each op of the run counted.
    """

    name: str
    part: Part
    path: str
    scope: str
    job: str
    plan: Callable[[Settings, Grant, Mapping[str, str], bytes], Ops]
    is_about: Callable[[Settings, Grant, Mapping[str, str], Ops], bool]
    result: Callable[[Counts], dict[str, int]]


def _plan_backfill(settings: Settings, grant: Grant, _: Mapping[str, str], body: bytes) -> Ops:
    limit = _parsed(BackfillBody, body).limit
    request = BackfillRequest(org_id=grant.org_id)
    if limit is not None:
        request = replace(request, limit=limit)
    check(None, request)
    if request.org_id is not None:
        with PostgresDatabase(settings).connect() as connection:
            check(connection, request)
    return {
        "enqueue": {"limit": request.limit, "org_id": request.org_id},
        "project": {"org_id": request.org_id},
    }


def _is_my_backfill(_: Settings, grant: Grant, __: Mapping[str, str], ops: Ops) -> bool:
    return grant.org_id is None or ops["enqueue"]["config"]["org_id"] == grant.org_id


def _plan_rebuild(settings: Settings, grant: Grant, path: Mapping[str, str], body: bytes) -> Ops:
    asked = _parsed(RebuildBody, body)
    request = _of_path(path, asked.session_id, tuple(asked.run_ids or ()))
    with ItemsPostgresDatabase(settings).connect() as connection:
        check_platform(connection)
        # First of all: another organization is none, whatever else is asked.
        if grant.organization is not None:
            hold_to(connection, grant.organization, request)
        request.check()
        resolve_project(connection, request)
    return {"rebuild": {**path, "session_id": asked.session_id, "run_ids": asked.run_ids}}


def _of_path(
    path: Mapping[str, str], session_id: str | None = None, run_ids: tuple[str, ...] = ()
) -> RebuildRequest:
    return RebuildRequest(
        path["organization"], path["workspace"], path["project"], session_id, run_ids
    )


def _is_my_rebuild(settings: Settings, grant: Grant, path: Mapping[str, str], ops: Ops) -> bool:
    if grant.organization is not None:
        with ItemsPostgresDatabase(settings).connect() as connection:
            hold_to(connection, grant.organization, _of_path(path))
    config = ops["rebuild"]["config"]
    return all(config[name] == value for name, value in path.items())


_CALLS = (
    Call(
        name="backfill",
        part="reporting",
        path="/reports/admin/backfill",
        scope=REPORTS_ADMIN,
        job="backfill_reporting",
        plan=_plan_backfill,
        is_about=_is_my_backfill,
        result=lambda counts: dict(counts["enqueue"]),
    ),
    Call(
        name="rebuild",
        part="items",
        path="/org/{organization}/ws/{workspace}/projects/{project}/items/rebuild",
        scope=ITEMS_ADMIN,
        job="rebuild_items",
        plan=_plan_rebuild,
        is_about=_is_my_rebuild,
        result=lambda counts: {"processed": counts["rebuild"]["processed"]},
    ),
)


def calls_of(settings: Settings) -> list[Call]:
    """The calls of the parts that are on."""
    return [call for call in _CALLS if call.part in settings.parts]


@dataclass(frozen=True)
class Api:
    """Answers the calls.

    Args:
        prefix: the path below which everything is served.
        pages: where people see the UI, without a slash at the end.
    """

    settings: Settings
    tokens: TokenFile
    runs: Runs
    metrics: Metrics
    prefix: str
    pages: str
    read_only: bool

    def routes(self) -> list[BaseRoute]:
        """Each call, with and without `/api`, and its runs below it."""
        return [
            route
            for call in calls_of(self.settings)
            for base in (f"{self.prefix}/v1", f"{self.prefix}/api/v1")
            for route in (
                Route(base + call.path, self._measured(call, self._post), methods=["POST"]),
                Route(base + call.path + "/{run_id}", self._measured(call, self._get)),
            )
        ]

    def authorize(self, request: Request, scope: str) -> Grant:
        """What the request's token allows.

        Raises:
            Refusal: it has none that is known, or not for this.
        """
        token = bearer_token(request.headers)
        grant = None if token is None else self.tokens.find(token)
        if grant is None:
            raise Refusal(
                "Authorization: expected Bearer and a token of this server",
                code="unauthenticated",
                status=401,
            )
        if scope not in grant.scopes:
            raise Refusal(f"This token lacks the scope {scope}", code="forbidden", status=403)
        return grant

    def _measured(self, call: Call, answered: Callable[..., Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await answered(call, request)
            except Refusal as refusal:
                response = refused(refusal, request.url.path)
            except Exception as error:
                response = refused(_failed(error), request.url.path)
            seconds = time.perf_counter() - started
            self.metrics.observe(call.name, response.status_code, seconds)
            return response

        return endpoint

    async def _post(self, call: Call, request: Request) -> Response:
        grant = self.authorize(request, call.scope)
        if self.read_only:
            raise Refusal("This server launches nothing", code="forbidden", status=403)
        body = await request.body()
        if body and media_type(request.headers) != "application/json":
            raise Refusal(
                "Content-Type: expected application/json", code="unsupported_media_type", status=415
            )
        key = _idempotency_key(request)
        ops = await run_in_threadpool(call.plan, self.settings, grant, request.path_params, body)
        run_id = await self.runs.launch(Wanted(call.job, ops, grant.name, key))
        wait, is_async = _preferences(request)
        seconds = (0 if is_async else ANSWER_SECONDS) if wait is None else wait
        return await self._followed(call, request, run_id, seconds, is_async=is_async)

    async def _get(self, call: Call, request: Request) -> Response:
        grant = self.authorize(request, call.scope)
        path = dict(request.path_params)
        run_id = path.pop("run_id")
        if not await run_in_threadpool(self._is_about, call, grant, path, run_id):
            raise Refusal("No such run", code="not_found_error", status=404)
        wait, _ = _preferences(request)
        seconds = _GLANCE_SECONDS if wait is None else wait
        return await self._followed(call, request, run_id, seconds, is_async=True)

    def _is_about(self, call: Call, grant: Grant, path: Mapping[str, str], run_id: str) -> bool:
        """Whether there is such a run, of this call, and the token may know of it."""
        run = None if as_uuid(run_id) is None else self.runs.find(run_id)
        return (
            run is not None
            and run.job_name == call.job
            and TOKEN_TAG in run.tags
            and call.is_about(self.settings, grant, path, cast("Ops", run.run_config["ops"]))
        )

    async def _followed(
        self, call: Call, request: Request, run_id: str, seconds: float, *, is_async: bool
    ) -> Response:
        """The result of a run once it has ended, or where to ask for it."""
        path = request.url.path
        page = f"{self.pages}/runs/{run_id}"
        run = await self.runs.follow(run_id, seconds)
        if run is not None:
            try:
                counts = await run_in_threadpool(self.runs.counts, run)
            except Refusal as refusal:
                return refused(refusal, path, instance=page)
            return answer(call.result(counts))
        location = path if path.endswith(run_id) else f"{path}/{run_id}"
        if is_async:
            headers = {"Location": location, "Retry-After": _ASK_AGAIN}
            return answer({"run_id": run_id, "instance": page}, 202, headers=headers)
        goes_on = Refusal(
            f"Run {run_id} goes on: {page}. Ask for its result at the Location",
            code="still_running",
            status=504,
        )
        return refused(goes_on, path, instance=page, headers={"Location": location})


def _parsed(model: type[_Body], body: bytes) -> _Body:
    """The body as the model has it; none is one without fields."""
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        # Their messages name types and rules; what was given stays out.
        found = error.errors(include_url=False, include_input=False, include_context=False)
    fields = tuple(
        FieldError(tuple(str(step)[:_LONGEST_NAME] for step in one["loc"]), one["msg"], one["type"])
        for one in found
    )
    told = [": ".join(filter(None, (".".join(field.loc), field.msg))) for field in fields]
    detail = "; ".join(told[:_MOST_TOLD])
    if fields[0].type == "json_invalid":
        raise Refusal(detail, status=400, errors=fields[:_MOST_TOLD])
    allowed = ", ".join(
        f"{name} ({field.description})" for name, field in model.model_fields.items()
    )
    raise Refusal(f"{detail}. Allowed: {allowed}", status=422, errors=fields[:_MOST_TOLD])


def _idempotency_key(request: Request) -> str | None:
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise Refusal("Idempotency-Key: expected one, of 1 to 255 visible ASCII characters")
    return keys[0]


def _preferences(request: Request) -> tuple[int | None, bool]:
    """What `Prefer` asks for (RFC 7240): for how many seconds to wait, and whether to answer
    before the end of the run.
    """
    wait, is_async = None, False
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = (part.strip() for part in preference.partition("="))
        if name.lower() == "respond-async":
            is_async = True
        elif name.lower() == "wait" and re.fullmatch(r"[0-9]{1,6}", value):
            wait = min(int(value), ANSWER_SECONDS)
    return wait, is_async


def _failed(error: Exception) -> Refusal:
    """What is told of an error that nobody foresaw: nothing of its text, which may quote rows."""
    if isinstance(error, psycopg.Error):
        reason = error.diag.message_primary or type(error).__name__
        return Refusal(f"PostgreSQL failed: {reason}", code="upstream_failed", status=502)
    frames = "".join(traceback.format_tb(error.__traceback__))
    _logger.error("%s\n%s", type(error).__name__, frames)
    return Refusal("The log of the server tells more", code="internal_error", status=500)
