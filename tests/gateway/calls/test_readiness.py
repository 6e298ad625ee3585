"""What a gateway answers while the cluster starts, recovers, lacks experts or workers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.release import RELEASE
from gateway.calls.tenant_queues import CallDemand
from gateway.core.tuning import GatewayTuning
from gateway.text.tokenizer import Tokenizer
from tests.gateway.fakes import ScriptedEngine, attention_entry, expert_entry, tiny_backend
from tests.gateway.stack import WAIT_S, Stack, complete, post, running_stack
from workers.requests.request import Timings

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def module_stack() -> Iterator[Stack]:
    """A gateway whose cluster these tests may change."""
    with running_stack(tuning=GatewayTuning(stream_wait_s=0.1)) as stack:
        yield stack


@pytest.fixture
def moody(module_stack: Stack) -> Iterator[Stack]:
    """The same, serving before and after each test."""
    module_stack.engine.requests.clear()
    module_stack.engine.aborts.clear()
    yield module_stack
    whole: dict[str, Any] = {"experts_complete": True, "late_workers": []}
    module_stack.call(lambda: module_stack.controller.change(**whole))
    module_stack.serve()


def _change(stack: Stack, **values: Any) -> None:
    """Publish a state and wait until the gateway has it."""
    stack.call(lambda: stack.controller.change(**values))
    wanted = stack.controller.state["version"]
    snapshot = stack.gateway.cluster
    stack.wait_for(lambda: (snapshot.snapshot or {}).get("version") == wanted, "the snapshot")


def _refused(stack: Stack, code: str) -> None:
    ready = stack.http.get("/ready")
    assert ready.status_code == 503
    assert ready.json()["ready"] is False
    assert ready.json()["reasons"]
    response = post(stack, "/v1/completions", prompt="x")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("service_unavailable", code)
    assert stack.http.get("/health").status_code == 200


def test_nothing_is_served_before_the_cluster_is_there() -> None:
    with running_stack(serving=False) as stack:
        stack.wait_for(lambda: stack.gateway.cluster.snapshot is not None, "the snapshot")
        _refused(stack, "not_ready")
        (model,) = stack.http.get("/v1/models").json()["data"]
        assert model["id"] == "tiny"
        assert stack.http.get("/cluster/v1/status").json()["state"] == "STARTING"
        assert post(stack, "/tokenize", prompt="hello").json()["count"] == 1
        stack.serve()
        assert stack.http.get("/ready").json() == {"ready": True, "reasons": []}
        complete(stack, prompt="x", max_tokens=1)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"state": "DEGRADED", "experts_complete": False}, "experts_unavailable"),
        ({"state": "DRAINING"}, "draining"),
        ({"state": "STOPPED"}, "not_ready"),
        ({"state": "STARTING", "error": "expert-1 did not start"}, "not_ready"),
        ({"workers": []}, "not_ready"),
    ],
)
def test_states_that_serve_nothing(moody: Stack, values: dict[str, Any], code: str) -> None:
    _change(moody, **values)
    if values.get("workers") == []:
        moody.wait_for(lambda: not moody.engines.clients, "the streams to end")
    _refused(moody, code)


def test_a_degraded_cluster_with_all_experts_serves(moody: Stack) -> None:
    _change(moody, state="DEGRADED")
    assert moody.http.get("/ready").status_code == 200
    complete(moody, prompt="x", max_tokens=1)


def test_steps_that_wait_for_a_worker_make_it_unready_by_rank(moody: Stack) -> None:
    workers = [*moody.controller.state["workers"], expert_entry(1)]
    _change(moody, workers=workers, late_workers=["expert-1", "expert-7"])
    ready = moody.http.get("/ready")
    assert ready.status_code == 503
    reason = "steps wait for expert rank 1 (expert-1), expert-7"
    assert ready.json() == {"ready": False, "reasons": [reason]}
    complete(moody, prompt="x", max_tokens=1)  # requests are still taken, and wait
    _change(moody, late_workers=[])
    assert moody.http.get("/ready").json() == {"ready": True, "reasons": []}


def test_a_recovery_says_for_whom_it_waits(moody: Stack) -> None:
    _change(moody, state="RECOVERING", error=None, late_workers=["attention-0"])
    reasons = moody.http.get("/ready").json()["reasons"]
    waits = "steps wait for attention rank 0 (attention-0)"
    assert reasons == ["the cluster is RECOVERING", waits]


def test_a_controller_of_an_older_term_is_not_followed(
    moody: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    _change(moody, term=3)
    before = moody.gateway.cluster.snapshot
    workers = moody.controller.state["workers"]
    moody.call(lambda: moody.controller.change(term=2, workers=[]))
    moody.wait_for(lambda: "controller of the older term 2" in caplog.text, "the refusal")
    assert moody.gateway.cluster.snapshot is before
    assert complete(moody, prompt="x")["choices"]
    _change(moody, term=3, workers=workers)


def test_a_controller_of_another_release_is_refused_by_name() -> None:
    with running_stack(serving=False) as stack:
        stack.call(lambda: stack.controller.change(release="9.9.9"))
        stack.wait_for(lambda: bool(stack.gateway.cluster.refusal), "the refusal")
        stack.gateway.cluster.snapshot = None  # it may have one from before the change
        _refused(stack, "not_ready")
        refusal = f"release 9.9.9 of the controller, {RELEASE} of the gateway"
        (reason,) = stack.http.get("/ready").json()["reasons"]
        assert refusal in reason
        assert refusal in post(stack, "/v1/completions", prompt="x").json()["error"]["message"]


def test_a_controller_of_another_release_is_not_followed(
    moody: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    before, workers = moody.gateway.cluster.snapshot, moody.controller.state["workers"]
    moody.call(lambda: moody.controller.change(release="9.9.9", workers=[]))
    moody.wait_for(lambda: "release 9.9.9 of the controller" in caplog.text, "the refusal")
    assert moody.gateway.cluster.snapshot is before
    assert moody.http.get("/ready").status_code == 200
    assert complete(moody, prompt="x")["choices"]
    _change(moody, release=RELEASE, workers=workers)
    assert not moody.gateway.cluster.refusal


def test_requests_wait_for_a_recovery(moody: Stack) -> None:
    _change(moody, state="RECOVERING")
    assert moody.http.get("/ready").status_code == 503
    answers: list[dict[str, Any]] = []
    client = threading.Thread(
        target=lambda: answers.append(complete(moody, prompt="x", max_tokens=2))
    )
    client.start()
    time.sleep(0.2)
    assert not moody.engine.requests
    _change(moody, state="SERVING")
    client.join(WAIT_S)
    assert answers[0]["usage"]["completion_tokens"] == 2


def test_the_wait_for_a_stream_begins_again_after_a_recovery() -> None:
    with running_stack(tuning=GatewayTuning(stream_wait_s=1.0)) as stack:
        complete(stack, prompt="x", max_tokens=1)  # the gateway knows the model
        _change(stack, workers=[])  # its stream has ended; the controller still says SERVING
        statuses: list[int] = []
        client = threading.Thread(
            target=lambda: statuses.append(post(stack, "/v1/completions", prompt="x").status_code)
        )
        client.start()
        stack.wait_for(lambda: stack.gateway.admission.num_requests == 1, "the request")
        _change(stack, state="RECOVERING")
        time.sleep(1.1)
        stack.serve()
        client.join(WAIT_S)
        assert statuses == [200]


def test_requests_wait_no_longer_than_their_time(moody: Stack) -> None:
    _change(moody, state="RECOVERING")
    headers = {"x-request-timeout-ms": "200"}
    response = moody.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert response.status_code == 408
    error = response.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert error["message"] == "the request's deadline has passed: the cluster is recovering"


def test_running_requests_go_on_through_a_recovery(moody: Stack) -> None:
    moody.engine.step_s = 0.02
    answers: list[dict[str, Any]] = []
    client = threading.Thread(
        target=lambda: answers.append(complete(moody, prompt="x", max_tokens=30))
    )
    client.start()
    moody.wait_for(lambda: bool(moody.engine.running), "the request")
    _change(moody, state="RECOVERING", generation=2)
    _change(moody, state="SERVING")
    client.join(WAIT_S)
    moody.engine.step_s = 0.0
    assert answers[0]["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize(("is_started", "status"), [(False, 408), (True, 504)])
def test_time_limits(moody: Stack, is_started: bool, status: int) -> None:
    moody.engine.step_s, moody.engine.is_paused = 0.02, not is_started
    body = {"prompt": "x", "max_tokens": 400}
    for limit_ms in (250, 1000, 4000):  # a busy machine may need more until the first token
        headers = {"x-request-timeout-ms": str(limit_ms)}
        response = moody.http.post("/v1/completions", json=body, headers=headers)
        if response.status_code == status:
            break
    moody.engine.step_s, moody.engine.is_paused = 0.0, False
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert response.headers.get("x-should-retry") == ("false" if is_started else None)
    moody.wait_for(lambda: not moody.engine.running, "the abort")


class _StuckTokenizer(Tokenizer):
    """Continues when the test says so."""

    def __init__(self) -> None:
        super().__init__(tiny_backend())
        self.may_go_on = threading.Event()

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """See ``Tokenizer``."""
        self.may_go_on.wait(WAIT_S)
        return super().encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See ``Tokenizer``."""
        self.may_go_on.wait(WAIT_S)
        return super().decode(ids, skip_special_tokens)


def test_time_limits_of_the_tokenizer() -> None:
    tokenizer = _StuckTokenizer()
    bodies: dict[str, dict[str, Any]] = {
        "/tokenize": {"prompt": "x" * 5000},
        "/detokenize": {"tokens": [5]},
    }
    with running_stack(tokenizer=tokenizer) as stack:
        for path, body in bodies.items():
            response = stack.http.post(path, json=body, headers={"x-request-timeout-ms": "50"})
            assert response.status_code == 504, response.text
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
            assert response.headers["x-should-retry"] == "false"
        tokenizer.may_go_on.set()
        for path, body in bodies.items():
            assert post(stack, path, **body).status_code == 200


@pytest.mark.parametrize(("begun_s", "status"), [(0.2, 408), (0.1, 504)])
def test_a_worker_reports_whether_it_had_begun(moody: Stack, begun_s: float, status: int) -> None:
    """Of a long prompt the gateway has seen no token yet."""
    moody.engine.error = ("not done within 200 ms", "deadline_exceeded")
    moody.engine.error_timings = Timings(
        first_dispatch_s=begun_s, first_token_s=0.2, finished_s=0.2
    )
    response = post(moody, "/v1/completions", prompt="x")
    moody.engine.error, moody.engine.error_timings = None, None
    assert response.status_code == status
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers.get("x-should-retry") == ("false" if status == 504 else None)


def test_a_full_queue_is_429() -> None:
    section = GatewaySection(max_queue=2, request_timeout_s=WAIT_S)
    with running_stack(section) as stack:
        stack.engine.is_paused = True
        clients = [
            threading.Thread(target=lambda: complete(stack, prompt="x", max_tokens=1))
            for _ in range(2)
        ]
        for client in clients:
            client.start()
        stack.wait_for(lambda: len(stack.engine.running) == 2, "both requests")
        response = post(stack, "/v1/completions", prompt="x")
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "queue_full")
        too_many = post(stack, "/v1/completions", prompt=["x"] * 3)
        assert too_many.status_code == 400
        stack.engine.is_paused = False
        for client in clients:
            client.join(WAIT_S)
        complete(stack, prompt="x", max_tokens=1)
        assert 'admission_rejections_total{model_name="tiny",reason="queue_full"} 1.0' in (
            stack.gateway.metrics.render().decode()
        )


def test_too_many_tokens_in_the_queue_are_429() -> None:
    section = GatewaySection(max_queue_tokens=50, request_timeout_s=WAIT_S)
    with running_stack(section) as stack:
        stack.engine.is_paused = True
        client = threading.Thread(target=lambda: complete(stack, prompt="x", max_tokens=40))
        client.start()
        stack.wait_for(lambda: len(stack.engine.running) == 1, "the first request")
        response = post(stack, "/v1/completions", prompt="x", max_tokens=10)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        message = response.json()["error"]["message"]
        assert "41 tokens, and this request needs 11 more, at most 50 (max_queue_tokens)" in message
        stack.engine.is_paused = False
        client.join(WAIT_S)
        complete(stack, prompt="x", max_tokens=60)
        assert 'admission_rejections_total{model_name="tiny",reason="queue_tokens"} 1.0' in (
            stack.gateway.metrics.render().decode()
        )


def test_a_workers_full_queue_is_counted_and_the_retry_time_follows_the_drain(
    moody: Stack,
) -> None:
    moody.engine.error = ("900 sequences are waiting, at most 64 (max_waiting) may", "queue_full")
    response = post(moody, "/v1/completions", prompt="x")
    moody.engine.error = None
    assert response.status_code == 429
    assert response.json()["error"]["message"].startswith("900 sequences are waiting")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert 'reason="worker_queue_full"} 1.0' in moody.gateway.metrics.render().decode()


def test_work_is_shared_between_workers(moody: Stack) -> None:
    second = ScriptedEngine(name="attention-1")
    moody.run(second.start())
    entries = [attention_entry(moody.engine, 0), attention_entry(second, 1)]
    _change(moody, workers=entries)
    moody.wait_for(lambda: len(moody.engines.clients) == 2, "both streams")
    complete(moody, prompt=["a", "b", "c", "d"], max_tokens=2)
    assert len(moody.engine.requests) == len(second.requests) == 2
    _change(moody, workers=entries[:1])
    moody.wait_for(lambda: len(moody.engines.clients) == 1, "one stream")
    moody.run(second.stop())


def test_a_silent_worker_is_dropped() -> None:
    second = ScriptedEngine(name="attention-1", answers_pings=False)
    with running_stack(silence_limit_s=1.0) as stack:
        stack.run(second.start())
        _change(stack, workers=[attention_entry(stack.engine, 0), attention_entry(second, 1)])
        stack.wait_for(lambda: second.num_hellos > 1, "a second try, after the end of the first")
        stack.run(second.stop())


def test_a_gateway_that_stood_still_blames_no_worker() -> None:
    """What came in the meantime is not read yet when it looks at the clock."""
    with running_stack(silence_limit_s=1.0) as stack:
        stack.call(lambda: time.sleep(1.5))
        pings = stack.engine.num_pings
        stack.wait_for(lambda: stack.engine.num_pings > pings + 3, "pings after it")
        assert stack.engine.num_hellos == 1


def test_a_queue_that_is_longer_than_the_time_refuses_at_once(moody: Stack) -> None:
    complete(moody, prompt="x", max_tokens=1)
    admission = moody.gateway.admission.admission
    assert admission is not None
    waiting = []

    def fill() -> None:
        """More than run at once; one of them ends every second."""
        admission.max_wait_s = math.inf
        now_s = time.monotonic()
        capacity = moody.config.workers.num_attention_ranks * moody.config.engine.max_num_seqs
        running = CallDemand(num_requests=capacity, num_tokens=capacity)
        waiting.append(admission.admit(running, now_s - 10.0))
        waiting.extend(admission.admit(CallDemand(), now_s - 10.0) for _ in range(12))
        for age_s in range(8):
            waiting.pop().release(now_s - 9.0 + age_s)

    def empty() -> None:
        admission.max_wait_s = moody.config.gateway.max_queue_wait_s
        for ticket in waiting:
            ticket.release(time.monotonic())

    moody.call(fill)
    headers = {"x-request-timeout-ms": "2000"}
    response = moody.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert response.status_code == 408
    assert "queue" in response.json()["error"]["message"]
    moody.call(empty)
    complete(moody, prompt="x", max_tokens=1)


def test_a_time_limit_of_nothing_is_no_lost_worker(stack: Stack) -> None:
    """It may be over before a worker was even picked; no worker was lost then."""
    for limit_ms in (1, 1, 1, 2, 3) * 6:
        headers = {"x-request-timeout-ms": str(limit_ms)}
        body = {"prompt": "x", "max_tokens": 400}
        response = stack.http.post("/v1/completions", json=body, headers=headers)
        assert response.status_code in (200, 408, 504), response.text
