"""Answers of the HTTP API: results, and refusals in the form that the API of the path has."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from everruns_pipelines.errors import Refusal

# Seconds after which to ask again, by status.
_RETRY_AFTER = {409: 10, 429: 2, 503: 5, 504: 5}


def is_of_items(path: str) -> bool:
    """Whether the path is one of the items API, whose errors have a form of their own."""
    return "/v1/org/" in path


def answer(
    content: Mapping[str, Any],
    status: int = 200,
    *,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    """JSON in ASCII: whatever the request spelled in a name of a field can be told back."""
    headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(json.dumps(content), status, headers, media_type)


def refused(
    refusal: Refusal,
    path: str,
    *,
    instance: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A refusal, as the API that the path belongs to shapes it.

    Args:
        instance: where a person sees the run that it is about.
    """
    after = _RETRY_AFTER.get(refusal.status)
    headers = dict(headers or {})
    if after is not None:
        headers["Retry-After"] = str(after)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if is_of_items(path):
        return answer(refusal.as_items_error(), refusal.status, headers=headers)
    problem = refusal.as_problem_details()
    if instance is not None:
        problem["instance"] = instance
    if after is not None:
        problem["retry_after_seconds"] = after
    return answer(problem, refusal.status, headers=headers, media_type="application/problem+json")
