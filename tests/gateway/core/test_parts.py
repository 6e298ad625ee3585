"""The small parts: router, admission, keys, the error table."""

from __future__ import annotations

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.core import errors
from gateway.auth.auth import KeyRing
from gateway.core.errors import (
    ClientGoneError,
    RouteError,
    error_from_engine,
    report_error,
)
from gateway.generation.admission import Admission


def test_admission_bounds_requests_and_gives_places_back_once() -> None:
    admission = Admission(max_requests=2, max_tokens=100, capacity=8)
    first = admission.admit(1, 10, 0.0)
    second = admission.admit(1, 10, 0.0)
    with pytest.raises(errors.QueueFullError, match="at most 2") as caught:
        admission.admit(1, 10, 0.0)
    assert 1 <= caught.value.retry_after_s <= 60
    first.release(1.0)
    first.release(1.0)
    assert (admission.num_requests, admission.num_tokens) == (1, 10)
    second.release(2.0)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_admission_bounds_bytes_of_embeddings() -> None:
    admission = Admission(max_requests=8, max_tokens=100, capacity=8, max_prompt_bytes=100)
    first = admission.admit(1, 1, 0.0, num_bytes=150)  # alone, however large
    admission.admit(1, 1, 0.0)
    with pytest.raises(errors.QueueFullError, match=r"150 bytes of embeddings, .* needs 10"):
        admission.admit(1, 1, 0.0, num_bytes=10)
    first.release(1.0)
    first.release(1.0)
    admission.admit(1, 1, 1.0, num_bytes=10)
    assert admission.num_bytes == 10


def test_admission_bounds_tokens_but_never_a_lone_call() -> None:
    admission = Admission(max_requests=8, max_tokens=100, capacity=8)
    admission.admit(1, 1000, 0.0)
    with pytest.raises(errors.QueueFullError, match="tokens"):
        admission.admit(1, 1, 0.0)


def test_the_retry_time_follows_the_drain() -> None:
    admission = Admission(max_requests=100, max_tokens=10**6, capacity=10)
    tickets = [admission.admit(1, 1, 0.0) for _ in range(100)]
    assert admission.queue_time_s() == 0.0
    for place, ticket in enumerate(tickets[:40], start=1):
        ticket.release(place / 2)  # two a second
    assert admission.num_waiting == 50
    assert admission.retry_after_s(20) == pytest.approx(10.0)
    assert admission.queue_time_s() == pytest.approx(25.0)


@pytest.mark.parametrize("capacity", [4, 16])
def test_the_retry_time_follows_the_drain_of_a_full_queue(capacity: int) -> None:
    """Whether or not the engines could run more than the queue holds."""
    admission = Admission(max_requests=4, max_tokens=10**6, capacity=capacity)
    tickets = [admission.admit(1, 1, 0.0) for _ in range(4)]
    for second in range(0, 400, 10):  # each takes 40 s: one leaves every 10 s
        tickets.pop(0).release(second + 10.0)
        tickets.append(admission.admit(1, 1, second + 10.0))
    for num_requests in (1, 3):
        with pytest.raises(errors.QueueFullError) as caught:
            admission.admit(num_requests, 1, 405.0)
        assert caught.value.retry_after_s == pytest.approx(10.0 * num_requests)


def test_the_retry_time_of_a_queue_full_of_tokens_follows_its_requests() -> None:
    admission = Admission(max_requests=100, max_tokens=30, capacity=16)
    tickets = [admission.admit(1, 10, 0.0) for _ in range(3)]
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(1, 10, 5.0)
    assert caught.value.retry_after_s == 5.0  # nothing has finished
    for second in range(10, 1000, 10):  # each takes 30 s: one leaves every 10 s
        tickets.pop(0).release(float(second))
        tickets.append(admission.admit(1, 10, float(second)))
    with pytest.raises(errors.QueueFullError) as caught:
        admission.admit(1, 10, 995.0)
    assert caught.value.retry_after_s == pytest.approx(10.0, rel=0.05)


def test_quiet_times_do_not_count_for_the_drain_rate() -> None:
    admission = Admission(max_requests=100, max_tokens=10**6, capacity=10)
    for hour in range(20):
        admission.admit(1, 1, hour * 3600.0).release(hour * 3600.0 + 1)
    for _ in range(50):
        admission.admit(1, 1, 100_000.0)
    assert admission.queue_time_s() == 0.0


@pytest.mark.parametrize(
    ("authorization", "api_key", "ok"),
    [
        ("Bearer secret", None, True),
        ("bearer other", None, True),
        (None, "secret", True),
        (None, None, False),
        ("Bearer wrong", None, False),
        ("Bearer secre", None, False),
        ("Basic secret", None, False),
        ("secret", None, False),
        ("Bearer \udcff", None, False),
    ],
)
def test_keys(authorization: str | None, api_key: str | None, ok: bool) -> None:
    ring = KeyRing(["secret", "other"])
    if ok:
        ring.check(authorization, api_key)
    else:
        with pytest.raises(errors.AuthenticationError):
            ring.check(authorization, api_key)


def test_no_keys_let_everybody_in() -> None:
    KeyRing().check(None)


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
