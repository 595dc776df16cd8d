"""Refusals: what was wrong and what is allowed, rendered as each API of the platform renders it.

A refusal is raised before anything is touched. What fails later is an ordinary exception and
fails the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class SettingsError(ValueError):
    """An environment variable is set but wrong; the message names it and what is expected."""


class RunFailure(Exception):
    """A run was started and failed, or a look found something wrong; says why, and holds nothing of
    the data.

    Args:
        result: what is to be printed all the same.
    """

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request: where (`loc`), what is allowed (`msg`), which kind (`type`)."""

    loc: tuple[str, ...]
    msg: str
    type: str = "value_error"


class Refusal(Exception):
    """A request that is not carried out.

    Args:
        detail: what was wrong and what is allowed, for a person. Never payload, never a secret.
        code: a stable word for programs, such as `validation_error` or `not_found_error`.
        status: the HTTP status the platform's API answers with.
        allowed_actions: what the caller can do instead.
        errors: the fields at fault.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str = "validation_error",
        status: int = 400,
        allowed_actions: tuple[str, ...] = (),
        errors: tuple[FieldError, ...] = (),
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.allowed_actions = allowed_actions
        self.errors = errors

    @classmethod
    def from_error(cls, told: Mapping[str, Any]) -> "Refusal":
        """The refusal that either API's form tells of."""
        return cls(
            told["detail"],
            code=told["code"],
            # The items API's form has none.
            status=told.get("status", _STATUSES.get(told["code"], 400)),
            allowed_actions=tuple(told.get("allowed_actions", ())),
            errors=tuple(
                FieldError(tuple(one["loc"]), one["msg"], one["type"])
                for one in told.get("errors", ())
            ),
        )

    def as_problem_details(self) -> dict[str, Any]:
        """The reporting API's form (RFC 9457 problem details)."""
        return {
            "title": _TITLES[self.code],
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "allowed_actions": list(self.allowed_actions),
        }

    def as_items_error(self) -> dict[str, Any]:
        """The items API's form."""
        error: dict[str, Any] = {"code": self.code, "detail": self.detail, "type": self.code}
        if self.errors:
            error["errors"] = [
                {"loc": list(field.loc), "msg": field.msg, "type": field.type}
                for field in self.errors
            ]
        return error


_TITLES = {
    "validation_error": "The request is not valid",
    "not_found_error": "Not found",
    "incompatible_schema": "The database lacks what is needed",
    "unavailable": "A server cannot be reached",
    "permission_denied": "The database refuses access",
    "locked": "Another backfill or repair is running",
    "unauthenticated": "A valid token is needed",
    "forbidden": "Not allowed",
    "method_not_allowed": "Not a method of this address",
    "request_timeout": "The request took too long to arrive",
    "payload_too_large": "The request is too large",
    "unsupported_media_type": "Not a content type that is understood",
    "too_many_requests": "Too many requests at once",
    "run_failed": "The run failed",
    "internal_error": "An error of ours",
    "upstream_failed": "A database failed",
    "still_running": "The run goes on",
}

_STATUSES = {
    "not_found_error": 404,
    "locked": 409,
    "incompatible_schema": 503,
    "unavailable": 503,
    "permission_denied": 503,
}
