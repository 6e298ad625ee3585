"""Maps exceptions to HTTP status, error object and gRPC status.

Handlers raise exceptions; ``http.middleware`` and ``grpc.call`` map them. Messages name the field,
its value and the limit. An exception that is not in the table is a bug, of which the client gets
only the request id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from cluster.core.errors import (
    AuthenticationError,
    ConflictError,
    ContextLengthError,
    DeadlineExceededError,
    ExpertMeshError,
    KeyLimitError,
    ModelNotFoundError,
    NotReadyError,
    PermissionDeniedError,
    PoisonousRequestError,
    QueueFullError,
    RequestAbortedError,
    RequestError,
    RequestFailedError,
    RequestTooLargeError,
    UnknownNameError,
    UnsupportedParameterError,
)

ERROR_DOMAIN = "expertmesh"
"""Domain of ``google.rpc.ErrorInfo``."""


class ClientGoneError(ExpertMeshError):
    """The client closed its connection."""


class SlowClientError(ExpertMeshError):
    """The client reads its stream too slowly."""


class RouteError(ExpertMeshError):
    """The path does not exist, or does not allow the method."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status
        self.code = "method_not_allowed" if status == 405 else "not_found"

    def __str__(self) -> str:
        return str(self.args[0])


class StorageError(ExpertMeshError):
    """The state folder cannot be read or written, or contains a damaged object."""


class StorageFullError(StorageError):
    """A key has reached its storage limit, or the disk is full."""


class KeyFullError(StorageFullError):
    """A key has reached its storage limit; nothing was written."""


class StorageTimeoutError(StorageError):
    """The disk does not respond, or is too slow for the waiting calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorReport:
    """An error as the client receives it."""

    http_status: int
    grpc_code: grpc.StatusCode
    type: str
    """``error.type`` of the body."""
    code: str
    """``error.code`` of the body, and the reason of ``google.rpc.ErrorInfo``."""
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None
    """False if a retry cannot help; None if the status tells whether it can."""

    def body(self) -> dict[str, Any]:
        """The error object of the HTTP interface."""
        error = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**error, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the error."""
        headers = {}
        if self.http_status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.http_status == 413:
            headers["connection"] = "close"  # the body may not have been read whole
        if self.retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
            headers["retry-after-ms"] = str(int(self.retry_after_s * 1000))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers

    def status_details(self, request_id: str) -> bytes:
        """Value of ``grpc-status-details-bin``: a serialized ``google.rpc.Status``."""
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.code, domain=ERROR_DOMAIN),
            error_details_pb2.RequestInfo(request_id=request_id),
        ]
        if self.param is not None:
            request = error_details_pb2.BadRequest()
            request.field_violations.add(field=self.param, description=self.message)
            details.append(request)
        if self.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.retry_after_s * 1000))
            details.append(retry)
        status = status_pb2.Status(code=self.grpc_code.value[0], message=self.message)
        for detail in details:
            status.details.add().Pack(detail)
        return bytes(status.SerializeToString())


_INVALID = "invalid_request_error"
_CODES = grpc.StatusCode
ERROR_TABLE: tuple[tuple[type[ExpertMeshError], int, str, str, grpc.StatusCode], ...] = (
    # exception, HTTP status, type, code (empty: the exception's own), gRPC status
    (UnsupportedParameterError, 400, _INVALID, "", _CODES.UNIMPLEMENTED),
    (ContextLengthError, 400, _INVALID, "", _CODES.INVALID_ARGUMENT),
    (ModelNotFoundError, 404, _INVALID, "", _CODES.NOT_FOUND),
    (RequestError, 400, _INVALID, "", _CODES.INVALID_ARGUMENT),
    (AuthenticationError, 401, "authentication_error", "invalid_api_key", _CODES.UNAUTHENTICATED),
    (PermissionDeniedError, 403, "permission_error", "permission_denied", _CODES.PERMISSION_DENIED),
    (KeyLimitError, 429, "rate_limit_error", "rate_limit_exceeded", _CODES.RESOURCE_EXHAUSTED),
    (RequestTooLargeError, 413, _INVALID, "request_too_large", _CODES.RESOURCE_EXHAUSTED),
    (QueueFullError, 429, "overloaded_error", "queue_full", _CODES.RESOURCE_EXHAUSTED),
    (NotReadyError, 503, "service_unavailable", "", _CODES.UNAVAILABLE),
    (PoisonousRequestError, 500, "server_error", "poisonous_request", _CODES.INTERNAL),
    (RequestFailedError, 500, "server_error", "internal_error", _CODES.INTERNAL),
    (RequestAbortedError, 409, "conflict_error", "request_aborted", _CODES.ABORTED),
    (ConflictError, 409, "conflict_error", "failed_precondition", _CODES.FAILED_PRECONDITION),
    (StorageFullError, 429, "rate_limit_error", "storage_full", _CODES.RESOURCE_EXHAUSTED),
    (StorageTimeoutError, 503, "service_unavailable", "storage_timeout", _CODES.UNAVAILABLE),
    (StorageError, 500, "server_error", "storage_failed", _CODES.INTERNAL),
    (UnknownNameError, 404, _INVALID, "not_found", _CODES.NOT_FOUND),
    (DeadlineExceededError, 408, "timeout_error", "deadline_exceeded", _CODES.DEADLINE_EXCEEDED),
    (SlowClientError, 408, "timeout_error", "slow_client", _CODES.RESOURCE_EXHAUSTED),
    (RouteError, 404, _INVALID, "", _CODES.UNIMPLEMENTED),
    (ClientGoneError, 499, _INVALID, "client_closed_request", _CODES.CANCELLED),
)
"""The first row that matches an exception by ``isinstance`` applies to it."""
_NOT_RETRYABLE = PoisonousRequestError | RequestAbortedError | SlowClientError | StorageError
"""Errors after which a retry cannot help."""


def report_error(error: BaseException, request_id: str = "") -> ErrorReport:
    """Convert an exception to the error that the client receives."""
    row = next((row for row in ERROR_TABLE if isinstance(error, row[0])), None)
    if row is None:
        return report_error(RequestFailedError(f"internal error in request {request_id}"))
    _, status, type_, code, grpc_code = row
    is_last = isinstance(error, _NOT_RETRYABLE)
    retry_s = getattr(error, "retry_after_s", None)
    if isinstance(error, RouteError):
        status = error.status
    elif isinstance(error, DeadlineExceededError) and error.started:
        status, is_last = 504, True
    return ErrorReport(
        http_status=status,
        grpc_code=grpc_code,
        type=type_,
        code=code or getattr(error, "code", ""),
        message=str(error),
        param=getattr(error, "param", None),
        retry_after_s=None if retry_s is None else clamp_retry_s(retry_s),
        should_retry=False if is_last else None,
    )


def error_from_engine(
    message: str, code: str, started: bool, param: str | None = None
) -> ExpertMeshError:
    """Make the exception for an engine's error; ``started``: the request had begun to run."""
    if code == "context_length_exceeded":
        return ContextLengthError(message, param)
    if code in ("invalid_value", "missing_required_parameter"):
        return RequestError(message, param, code)
    if code == "unsupported_parameter":
        return UnsupportedParameterError(message, param)
    if code == "model_not_found":
        return ModelNotFoundError(message)
    if code == "queue_full":
        return QueueFullError(message)
    if code in ("not_ready", "draining", "experts_unavailable"):
        return NotReadyError(message, code)
    if code == "deadline_exceeded":
        return DeadlineExceededError(message, started)
    if code == "poisonous_request":
        return PoisonousRequestError(message)
    return RequestFailedError(message)


def clamp_retry_s(seconds: float) -> float:
    """Clamp a retry time to the range that clients accept (1 to 60 s)."""
    return min(max(seconds, 1.0), 60.0)
