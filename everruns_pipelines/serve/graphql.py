"""Who may ask what of Dagster's GraphQL: people through the UI, programs with a token.

A token launches here what it launches over the API, the jobs of its scopes, and changes nothing
else. Whoever comes without one is a person, whose login is the matter of the proxy in front.
"""

import json
from typing import Any, cast

from graphql import FieldNode, GraphQLError, OperationDefinitionNode, OperationType, parse
from graphql.language import VariableNode
from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from everruns_pipelines.errors import Refusal
from everruns_pipelines.serve.tokens import ITEMS_ADMIN, REPORTS_ADMIN, Grant, TokenFile

_JOBS = {
    REPORTS_ADMIN: {"backfill_reporting", "project_reporting"},
    ITEMS_ADMIN: {"rebuild_items"},
}

_LOCATED = {"repositoryLocationName", "repositoryName"}


def bearer_token(headers: Headers) -> str | None:
    """The token of a request, if it carries one.

    Raises:
        Refusal: it carries more than one authorization.
    """
    given = headers.getlist("authorization")
    if len(given) > 1:
        raise Refusal("Authorization: expected one", code="unauthenticated", status=401)
    scheme, *rest = given[0].split(maxsplit=1) if given and given[0].strip() else ("basic",)
    # A login is the proxy's. Whatever else is taken for a token, so that no spelling of one passes
    # for a person.
    return None if scheme.lower() == "basic" else "".join(rest)


def media_type(headers: Headers) -> str:
    """The content type without its parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def judge_graphql(tokens: TokenFile, scope: Scope, headers: Headers, body: bytes) -> None:
    """Refuse a request of `/graphql` that must not pass.

    Raises:
        Refusal: a mutation that comes not by POST, or not as JSON; a token that is not known, or
            does not reach that far.
    """
    token = bearer_token(headers)
    grant = None if token is None else _grant(tokens.find(token))
    if scope["type"] == "websocket":
        if grant is not None:
            raise _forbidden("Subscriptions are for the UI, not for tokens")
        return
    if scope["method"] != "POST":
        for query in QueryParams(scope["query_string"]).getlist("query"):
            if any(one.operation is not OperationType.QUERY for one in _operations(query)):
                raise Refusal("Mutations come by POST", code="method_not_allowed", status=405)
        return
    if media_type(headers) != "application/json":
        raise Refusal(
            "Content-Type: expected application/json", code="unsupported_media_type", status=415
        )
    if grant is not None:
        _judge_reach(grant, body)


def _grant(grant: Grant | None) -> Grant:
    if grant is None:
        raise Refusal("Not a token of this server", code="unauthenticated", status=401)
    if grant.is_bound or not grant.scopes & set(_JOBS):
        raise _forbidden("This token does not reach GraphQL, which knows every organization")
    return grant


def _judge_reach(grant: Grant, body: bytes) -> None:
    """Let queries pass, and launches of the jobs of the token's scopes."""
    try:
        asked = json.loads(body)
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or not isinstance(asked.get("query"), str):  # pyright: ignore[reportUnknownMemberType]
        raise Refusal("Expected a JSON object with a query")
    asked = cast("dict[str, Any]", asked)
    allowed = {job for scope in grant.scopes for job in _JOBS.get(scope, ())}
    for operation in _operations(asked["query"]):
        if operation.operation is OperationType.QUERY:
            continue
        if _launched(operation, asked.get("variables")) not in allowed:
            raise _forbidden(f"This token launches {' and '.join(sorted(allowed))} only")


def _operations(query: str) -> list[OperationDefinitionNode]:
    """The operations of a document.

    Raises:
        Refusal: it cannot be read. Dagster, with more of its stack left, might read what is nested
            too deeply for us, so that it must not pass.
    """
    try:
        definitions = parse(query).definitions
    except GraphQLError as error:
        raise Refusal(f"query: {error.message}") from None
    return [one for one in definitions if isinstance(one, OperationDefinitionNode)]


def _launched(operation: OperationDefinitionNode, variables: object) -> str | None:
    """The job that a mutation launches, if that is all it does and a variable tells which."""
    match operation.selection_set.selections:
        case [FieldNode(name=name, arguments=[argument])] if name.value == "launchRun":
            value = argument.value
        case _:
            return None
    if not isinstance(value, VariableNode) or not isinstance(variables, dict):
        return None
    match cast("dict[str, object]", variables).get(value.name.value):
        # Another field might name another job.
        case {"selector": {"jobName": str(job), **rest}} if set(rest) <= _LOCATED:  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            return job
        case _:
            return None


def _forbidden(detail: str) -> Refusal:
    return Refusal(detail, code="forbidden", status=403)
