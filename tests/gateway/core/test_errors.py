"""The table from exceptions to HTTP status, error object and gRPC status."""

from __future__ import annotations

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.core import errors
from gateway.core.errors import (
    ClientGoneError,
    RouteError,
    SlowClientError,
    error_from_engine,
    report_error,
)

INVALID, CODES = "invalid_request_error", grpc.StatusCode
TABLE = [
    (errors.RequestError("m", "p"), 400, INVALID, "invalid_value", CODES.INVALID_ARGUMENT),
    (
        errors.ContextLengthError("m", "p"),
        *(400, INVALID, "context_length_exceeded", CODES.INVALID_ARGUMENT),
    ),
    (
        errors.UnsupportedParameterError("m", "p"),
        *(400, INVALID, "unsupported_parameter", CODES.UNIMPLEMENTED),
    ),
    (
        errors.AuthenticationError("m"),
        *(401, "authentication_error", "invalid_api_key", CODES.UNAUTHENTICATED),
    ),
    (errors.ModelNotFoundError("m"), 404, INVALID, "model_not_found", CODES.NOT_FOUND),
    (RouteError("m", 404), 404, INVALID, "not_found", CODES.UNIMPLEMENTED),
    (RouteError("m", 405), 405, INVALID, "method_not_allowed", CODES.UNIMPLEMENTED),
    (
        errors.DeadlineExceededError("m", False),
        *(408, "timeout_error", "deadline_exceeded", CODES.DEADLINE_EXCEEDED),
    ),
    (
        errors.DeadlineExceededError("m", True),
        *(504, "timeout_error", "deadline_exceeded", CODES.DEADLINE_EXCEEDED),
    ),
    (
        errors.RequestTooLargeError("m"),
        *(413, INVALID, "request_too_large", CODES.RESOURCE_EXHAUSTED),
    ),
    (
        errors.QueueFullError("m", 7.0),
        *(429, "overloaded_error", "queue_full", CODES.RESOURCE_EXHAUSTED),
    ),
    (
        errors.NotReadyError("m", "draining"),
        *(503, "service_unavailable", "draining", CODES.UNAVAILABLE),
    ),
    (errors.RequestFailedError("m"), 500, "server_error", "internal_error", CODES.INTERNAL),
    (
        SlowClientError("m"),
        *(408, "timeout_error", "slow_client", CODES.RESOURCE_EXHAUSTED),
    ),
    (ClientGoneError("m"), 499, INVALID, "client_closed_request", CODES.CANCELLED),
]


@pytest.mark.parametrize(("error", "status", "type_", "code", "grpc_code"), TABLE)
def test_the_error_table(
    error: Exception, status: int, type_: str, code: str, grpc_code: grpc.StatusCode
) -> None:
    report = report_error(error, "r1")
    assert report.http_status == status
    assert report.grpc_code is grpc_code
    param = getattr(error, "param", None)
    expected = {"message": "m", "type": type_, "param": param, "code": code}
    assert report.body() == {"error": expected}
    assert pickle.loads(pickle.dumps(error)).args == error.args


def test_a_bug_shows_its_request_id_only() -> None:
    report = report_error(KeyError("secret path"), "r1")
    assert (report.http_status, report.code) == (500, "internal_error")
    assert "r1" in report.message
    assert "secret" not in report.message


def test_headers_of_errors() -> None:
    assert report_error(errors.QueueFullError("m", 7.2)).headers() == {
        "retry-after": "8",
        "retry-after-ms": "7200",
    }
    assert (
        report_error(errors.NotReadyError("m", retry_after_s=0.1)).headers()["retry-after"] == "1"
    )
    late = report_error(errors.DeadlineExceededError("m", True)).headers()
    assert late == {"x-should-retry": "false"}
    assert report_error(errors.AuthenticationError("m")).headers() == {"www-authenticate": "Bearer"}


def test_rich_details() -> None:
    raw = report_error(errors.QueueFullError("full", 2.0)).status_details("r1")
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (8, "full")
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("queue_full", "expertmesh")
    request = error_details_pb2.RequestInfo()
    assert status.details[1].Unpack(request)
    assert request.request_id == "r1"
    retry = error_details_pb2.RetryInfo()
    assert status.details[2].Unpack(retry)
    assert retry.retry_delay.seconds == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("context_length_exceeded", errors.ContextLengthError),
        ("invalid_value", errors.RequestError),
        ("unsupported_parameter", errors.UnsupportedParameterError),
        ("queue_full", errors.QueueFullError),
        ("experts_unavailable", errors.NotReadyError),
        ("deadline_exceeded", errors.DeadlineExceededError),
        ("nan_logits", errors.RequestFailedError),
        ("", errors.RequestFailedError),
    ],
)
def test_errors_from_engines(code: str, kind: type[errors.ExpertMeshError]) -> None:
    assert type(error_from_engine("m", code, True)) is kind
