"""The OpenAPI document of our API, made of the calls and the models that answer them."""

from typing import Any

from pydantic import BaseModel

from everruns_pipelines import __version__
from everruns_pipelines.serve.answers import is_of_items
from everruns_pipelines.serve.api import BackfillBody, Call, RebuildBody, calls_of
from everruns_pipelines.settings import Settings

_BODIES: dict[str, type[BaseModel]] = {"backfill": BackfillBody, "rebuild": RebuildBody}
_COUNTS = {
    "backfill": ("enqueued", "events", "llm_generations", "sessions", "usage_ledger"),
    "rebuild": ("processed",),
}
_SUMMARIES = {
    "backfill": "Enqueue what is missing or stale, and project it",
    "rebuild": "Bring the items of a session or of runs back to what their spans say",
}
_REFUSALS = {
    "400": "A value is not allowed, or the body is no JSON",
    "401": "No token, or none that is known",
    "403": "The token lacks the scope, or the server launches nothing",
    "404": "No such organization, workspace, project or run",
    "408": "The body took too long to arrive",
    "409": "Another backfill or repair of all organizations holds the lock",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "422": "A field is unknown or of the wrong type, or the key belongs to another request",
    "429": "Too many runs of this token are at work",
    "500": "The run failed, or the server",
    "502": "A database failed",
    "503": "A server cannot be reached",
    "504": "The run goes on",
}
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "required": ["title", "status", "detail", "code", "allowed_actions"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "allowed_actions": {"type": "array", "items": {"type": "string"}},
        "instance": {"type": "string", "description": "where a person sees the run"},
        "retry_after_seconds": {"type": "integer"},
    },
}
_ITEMS_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["code", "detail", "type"],
    "additionalProperties": False,
    "properties": {
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "type": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["loc", "msg", "type"],
                "properties": {
                    "loc": {"type": "array", "items": {"type": "string"}},
                    "msg": {"type": "string"},
                    "type": {"type": "string"},
                },
            },
        },
    },
}
_ACCEPTED: dict[str, Any] = {
    "type": "object",
    "required": ["run_id", "instance"],
    "properties": {
        "run_id": {"type": "string", "format": "uuid"},
        "instance": {"type": "string", "description": "where a person sees the run"},
    },
}
_PREFER = {
    "name": "Prefer",
    "in": "header",
    "schema": {"type": "string"},
    "description": "`respond-async` answers before the end of the run; `wait=10` waits so long",
}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"},
    "description": "repeating a request with the same key makes no second run",
}


def document(settings: Settings, prefix: str) -> dict[str, Any]:
    """The document, of the parts that are on.

    Args:
        prefix: the path below which everything is served.
    """
    paths: dict[str, Any] = {}
    for call in calls_of(settings):
        paths[f"/api/v1{call.path}"] = {"post": _launch(call)}
        paths[f"/api/v1{call.path}/{{run_id}}"] = {"get": _look(call)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "everruns_pipelines", "version": __version__},
        "servers": [{"url": prefix or "/"}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Problem": _PROBLEM, "ItemsError": _ITEMS_ERROR, "Accepted": _ACCEPTED},
        },
        "security": [{"token": []}],
    }


def _launch(call: Call) -> dict[str, Any]:
    schema = _BODIES[call.name].model_json_schema()
    return {
        "operationId": call.name,
        "summary": _SUMMARIES[call.name],
        "description": f"Runs the job `{call.job}`. Needs the scope `{call.scope}`.",
        "parameters": [*_names(call), _PREFER, _KEY],
        "requestBody": {
            "required": call.scope == "items:admin",
            "content": {"application/json": {"schema": schema}},
        },
        "responses": _responses(call),
    }


def _look(call: Call) -> dict[str, Any]:
    run_id = {"name": "run_id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "operationId": f"{call.name}_run",
        "summary": "The result of a run, as the call that launched it would have answered",
        "parameters": [*_names(call), run_id, _PREFER],
        "responses": _responses(call),
    }


def _names(call: Call) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in call.path.split("/") if part.startswith("{")]
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "description": "slug or UUID",
        }
        for name in names
    ]


def _responses(call: Call) -> dict[str, Any]:
    counts = _COUNTS[call.name]
    result = {
        "type": "object",
        "required": list(counts),
        "additionalProperties": False,
        "properties": {name: {"type": "integer", "minimum": 0} for name in counts},
    }
    location = {"Location": {"schema": {"type": "string"}, "description": "where to ask again"}}
    if is_of_items(f"/v1{call.path}"):
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/ItemsError"}}}
    else:
        error = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        "200": {
            "description": "The run has ended",
            "content": {"application/json": {"schema": result}},
        },
        "202": {
            "description": "The run goes on",
            "headers": location,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Accepted"}}},
        },
        **{
            status: {"description": description, "content": error}
            for status, description in _REFUSALS.items()
        },
    }
