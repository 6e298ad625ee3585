"""Errors of calls, with the fields of the API's error object."""

from __future__ import annotations


class APIError(Exception):
    """A call failed.

    Args:
        message: the reason; for an invalid field it names the field, its value and the rule.
        code: machine-readable reason, such as ``context_length_exceeded``; empty if unknown.
        param: name of the invalid field; None if no field is invalid.
        status: HTTP status, or the equivalent for gRPC and ``LLM``; 0 without a response.
        retry_after_s: seconds after which a retry may succeed; None if the server sent no time.
    """

    def __init__(
        self,
        message: str,
        code: str = "",
        param: str | None = None,
        status: int = 0,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code, param, status, retry_after_s)
        self.message = message
        self.code = code
        self.param = param
        self.status = status
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class APIConnectionError(APIError):
    """The server cannot be reached, or the connection was lost."""


class APITimeoutError(APIError):
    """The call took longer than its time limit."""


class BadRequestError(APIError):
    """The request is invalid; ``param`` names the field."""


class AuthenticationError(APIError):
    """The API key is missing or unknown."""


class PermissionDeniedError(APIError):
    """The API key does not permit this call."""


class NotFoundError(APIError):
    """The model does not exist."""


class ConflictError(APIError):
    """The state of the cluster does not permit the call."""


class RateLimitError(APIError):
    """A limit of the key or the queue is exceeded: retry after ``retry_after_s``."""


class InternalServerError(APIError):
    """The server failed, or cannot serve now (status 503)."""


_STATUSES: tuple[tuple[type[APIError], tuple[int, ...], tuple[str, ...]], ...] = (
    # exception, HTTP statuses, gRPC statuses
    (BadRequestError, (400, 413), ("INVALID_ARGUMENT", "UNIMPLEMENTED")),
    (AuthenticationError, (401,), ("UNAUTHENTICATED",)),
    (PermissionDeniedError, (403,), ("PERMISSION_DENIED",)),
    (NotFoundError, (404,), ("NOT_FOUND",)),
    (APITimeoutError, (408, 504), ("DEADLINE_EXCEEDED",)),
    (ConflictError, (409,), ("ABORTED", "FAILED_PRECONDITION")),
    (RateLimitError, (429,), ("RESOURCE_EXHAUSTED",)),
    (InternalServerError, (503, *range(500, 600)), ("UNAVAILABLE",)),
)


def make_error(
    message: str, code: str, param: str | None, status: int | str, after_s: float | None = None
) -> APIError:
    """Make the exception for an HTTP status (a number) or a gRPC status (its name)."""
    for kind, numbers, names in _STATUSES:
        if status in numbers or status in names:
            number = status if isinstance(status, int) else numbers[0]
            return kind(message, code, param, number, after_s)
    kind, number = (APIError, status) if isinstance(status, int) else (InternalServerError, 500)
    return kind(message, code, param, number, after_s)
