"""Clients that open calls and then do nothing: others are served as before."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.config.gateway import GatewaySection
from cluster.core.errors import DeadlineExceededError, QueueFullError
from gateway.core.tuning import GatewayTuning
from gateway.grpc.call_limits import MAX_STREAMS, MAX_UNREAD_PER_CONNECTION, CallPool
from gateway.grpc.health import MAX_READS, MAX_REQUEST_BYTES, MAX_WATCHES
from protos import admin_pb2
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.stack import WAIT_S, Stack, running_stack
from tests.harness.http2_client import DATA, Http2Client

pytestmark = pytest.mark.heavy

CODES = grpc.StatusCode
WATCH, CHECK = "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"
GENERATE, STREAM = "/expertmesh.v1.Inference/Generate", "/expertmesh.v1.Inference/GenerateStream"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
MAX_QUEUE = 1
NUM_PLACES = MAX_QUEUE + 64
"""Calls that such a gateway runs at a time."""
KEY = (("authorization", "Bearer secret"),)
ROOT = (("authorization", "Bearer root"),)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
MESSAGE = request_of(text="x", sampling_params={"max_tokens": 3})
SECTION = GatewaySection(
    api_keys=("secret",), admin_keys=("root",), max_queue=MAX_QUEUE, request_timeout_s=WAIT_S
)


@contextlib.contextmanager
def serving_stack(tuning: GatewayTuning | None = None) -> Iterator[Stack]:
    """A gateway with keys and few places; its health has followed its readiness."""
    with running_stack(SECTION, tuning=tuning) as stack:
        stack.wait_for(lambda: check(stack) == SERVING, "the status")
        yield stack


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    with serving_stack() as stack:
        yield stack


@pytest.fixture
def keyed(running: Stack) -> Iterator[Stack]:
    """A gateway with few places that serves others after a test as before."""
    with running.as_new():
        yield running
        check_served(running)


def check_served(stack: Stack) -> None:
    """A client with a key and a probe get their answers, each on a connection of its own."""
    with grpc.insecure_channel(stack.grpc_target) as channel:
        assert InferenceStub(channel).Generate(MESSAGE, metadata=KEY, timeout=WAIT_S).choices
    assert check(stack) == SERVING
    stack.wait_no_requests()


def check(stack: Stack, service: str = "") -> int:
    """What a probe sees."""
    with grpc.insecure_channel(stack.grpc_target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
        return int(answer.status)


def request_for(service: str) -> bytes:
    return bytes(health_pb2.HealthCheckRequest(service=service).SerializeToString())


def test_a_watch_that_is_not_read_delays_no_change(keyed: Stack) -> None:
    with (
        Http2Client(keyed.grpc_target, window=0) as silent,
        grpc.insecure_channel(keyed.grpc_target) as channel,
    ):
        stream = silent.call(WATCH, request_for(""))
        silent.wait_for(lambda: silent.has_begun(stream), "the headers of its answer")
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=WAIT_S
        )
        assert next(watch).status == SERVING
        for late, status in ((["expert-1"], NOT_SERVING), ([], SERVING)):
            keyed.call(partial(keyed.controller.change, late_workers=late))
            assert next(watch).status == status
            assert check(keyed) == status
            assert check(keyed, "expertmesh.v1.Inference") == status
        assert not silent.data(stream)
        watch.cancel()


def test_a_watch_that_is_not_read_ends() -> None:
    with serving_stack() as stack:
        health = stack.grpc_server.health
        health._write_limit_s = 0.1
        with Http2Client(stack.grpc_target, window=0) as silent:
            stream = silent.call(WATCH, request_for(""))
            unread = stack.grpc_server.limits.unread
            silent.wait_for(lambda: len(unread) == 1, "the end of the watch")
            assert len(health.watches) == 0
            silent.open_window(stream, 100)
            assert silent.wait_status(stream) == CODES.RESOURCE_EXHAUSTED.value[0]
            assert silent.data(stream) == b"\0\0\0\0\2\x08\1"  # SERVING, read after all
            silent.wait_for(lambda: len(unread) == 0, "nothing that is unread")


def test_a_connection_that_reads_nothing_gets_no_more_answers() -> None:
    with serving_stack() as stack:
        stack.grpc_server.health._write_limit_s = 0.01
        unread = stack.grpc_server.limits.unread
        with Http2Client(stack.grpc_target, window=0) as silent:
            streams = [
                silent.call(CHECK, request_for("")) for _ in range(MAX_UNREAD_PER_CONNECTION)
            ]
            silent.wait_for(lambda: len(unread) == len(streams), "all that it does not read")
            refused = silent.wait_status(silent.call(CHECK, request_for("")))
            assert refused == CODES.RESOURCE_EXHAUSTED.value[0]
            for stream in streams:
                silent.cancel(stream)
            silent.wait_for(lambda: len(unread) == 0, "nothing that is unread")
        check_served(stack)


def test_idle_watches_keep_no_other_call_out(keyed: Stack) -> None:
    pool = keyed.grpc_server.health.watches
    with Http2Client(keyed.grpc_target, window=1000) as idle:
        streams = [idle.call(WATCH, request_for("")) for _ in range(2 * NUM_PLACES)]
        idle.wait_for(lambda: all(map(idle.data, streams)), "the first message of each")
        assert len(pool) == len(streams)
        check_served(keyed)
    keyed.wait_for(lambda: len(pool) == 0, "the end of all watches")


def test_watches_above_the_limit_end_the_oldest_of_the_largest_connection(
    keyed: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = keyed.grpc_server.health.watches
    monkeypatch.setattr(pool, "_burst_s", 0.0)
    with (
        grpc.insecure_channel(keyed.grpc_target) as channel,
        Http2Client(keyed.grpc_target, window=1000) as idle,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=WAIT_S
        )
        assert next(watch).status == SERVING
        streams = [idle.call(WATCH, request_for("")) for _ in range(2)]
        idle.wait_for(lambda: all(map(idle.data, streams)), "the first message of the oldest")
        streams += [idle.call(WATCH, request_for("")) for _ in range(MAX_WATCHES - 1)]
        for stream in streams[:2]:
            assert idle.wait_status(stream) == CODES.RESOURCE_EXHAUSTED.value[0]
        idle.wait_for(lambda: all(map(idle.data, streams)), "the first message of each")
        assert len(pool) == MAX_WATCHES
        keyed.call(lambda: keyed.controller.change(late_workers=["expert-1"]))
        assert next(watch).status == NOT_SERVING
        keyed.call(lambda: keyed.controller.change(late_workers=[]))
        assert next(watch).status == SERVING
        watch.cancel()


def test_checks_without_a_message_keep_no_check_out(
    keyed: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = keyed.grpc_server.health.reads
    monkeypatch.setattr(reads, "_burst_s", 0.0)
    with Http2Client(keyed.grpc_target) as silent:
        streams = [silent.call(CHECK, None) for _ in range(5)]
        keyed.wait_for(lambda: len(reads) == 5, "the oldest calls")
        streams += [silent.call(CHECK, None) for _ in range(MAX_READS)]
        for stream in streams[:5]:
            assert silent.wait_status(stream) == CODES.RESOURCE_EXHAUSTED.value[0]
        check_served(keyed)
    keyed.wait_for(lambda: len(reads) == 0, "the end of all checks")


def test_names_are_checked_before_anything_is_kept(keyed: Stack) -> None:
    health = keyed.grpc_server.health
    with grpc.insecure_channel(keyed.grpc_target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        huge = health_pb2.HealthCheckRequest(service="x" * (15 * 1024 * 1024))
        small = health_pb2.HealthCheckRequest(service="x" * MAX_REQUEST_BYTES)
        for request in (huge, small):
            for call in (stub.Check, lambda asked, **given: list(stub.Watch(asked, **given))):
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, timeout=WAIT_S)
                error: Any = caught.value
                assert error.code() is CODES.INVALID_ARGUMENT
                assert f"must be at most {MAX_REQUEST_BYTES} bytes" in error.details()
        unknown = health_pb2.HealthCheckRequest(service="another")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(unknown, timeout=WAIT_S)
        assert caught.value.code() is CODES.NOT_FOUND
        watch = stub.Watch(unknown, timeout=WAIT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        broken: Any = channel.unary_unary(CHECK, bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            broken(b"\xff" * 9, timeout=WAIT_S)
        assert caught.value.code() is CODES.INVALID_ARGUMENT
    keyed.wait_for(lambda: len(health.watches) + len(health.reads) == 0, "nothing that is kept")
    assert "another" not in repr(vars(health))


@pytest.mark.parametrize(
    ("path", "key"),
    [(CHECK, ()), (WATCH, ()), (GENERATE, KEY), (STREAM, KEY)],
    ids=["Check", "Watch", "Generate", "GenerateStream"],
)
def test_a_message_that_is_refused_is_not_kept(keyed: Stack, path: str, key: Any) -> None:
    """Not even until Python collects cycles: many of them come within that time."""
    limits, huge = keyed.grpc_server.limits, b"\xff" * (15 * 1024 * 1024)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        with grpc.insecure_channel(keyed.grpc_target) as channel:
            call: Any = channel.unary_unary(path, bytes, bytes)
            for _ in range(3):
                with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                    call(huge, metadata=key, timeout=WAIT_S)
        keyed.wait_for(lambda: limits.num_calls == 0, "the end of the calls")
        keyed.wait_for(
            lambda: tracemalloc.get_traced_memory()[0] < len(huge), "the end of the messages"
        )
    finally:
        tracemalloc.stop()
        gc.enable()


def test_idle_streams_of_reflection_keep_no_call_out(
    keyed: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = keyed.grpc_server.limits
    monkeypatch.setattr(limits.streams, "_burst_s", 0.0)
    with Http2Client(keyed.grpc_target, window=100_000) as idle:
        streams = [idle.call(REFLECTION, None, KEY) for _ in range(2 * MAX_STREAMS)]

        def ended() -> list[int]:
            """Not always the first: the server may begin them in another order."""
            return [status for own in streams if (status := idle.status(own)) is not None]

        idle.wait_for(lambda: len(ended()) >= MAX_STREAMS, "the end of what is too much")
        assert ended() == [CODES.RESOURCE_EXHAUSTED.value[0]] * MAX_STREAMS
        refused = idle.call(REFLECTION, None)
        assert idle.wait_status(refused) == CODES.UNAUTHENTICATED.value[0]
        check_served(keyed)
        with grpc.insecure_channel(keyed.grpc_target) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asks = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            found = list(stub.ServerReflectionInfo(asks, metadata=KEY, timeout=WAIT_S))
            assert found[0].list_services_response.service
    keyed.wait_for(lambda: len(limits.streams) == 0, "the end of all streams")


def test_idle_streams_of_events_keep_no_admin_call_out(keyed: Stack) -> None:
    path = "/expertmesh.v1.Admin/WatchCluster"
    with Http2Client(keyed.admin.grpc, window=100_000) as idle:
        streams = [idle.call(path, b"", ROOT) for _ in range(300)]
        idle.wait_for(lambda: all(map(idle.data, streams)), "the history in each")
        with grpc.insecure_channel(keyed.admin.grpc) as channel:
            stub = AdminStub(channel)
            asked = admin_pb2.ListOperationsRequest()
            stub.ListOperations(asked, metadata=ROOT, timeout=WAIT_S)
            watch = stub.WatchCluster(
                admin_pb2.WatchClusterRequest(), metadata=ROOT, timeout=WAIT_S
            )
            assert next(iter(watch)).cause == "start"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Stack]:
    """A gateway whose clients must send and read soon."""
    tuning = GatewayTuning(unread_limit_s=0.3, body_timeout_s=0.3)
    with serving_stack(tuning) as stack:
        yield stack


@pytest.mark.parametrize("path", [GENERATE, STREAM])
def test_an_answer_that_is_not_read_holds_no_place(impatient: Stack, path: str) -> None:
    limits = impatient.grpc_server.limits
    account = impatient.gateway.keys.check("Bearer secret")
    assert account is not None
    impatient.engine.requests.clear()
    with Http2Client(impatient.grpc_target, window=0) as silent:
        streams = [silent.call(path, MESSAGE.SerializeToString(), KEY)]
        silent.wait_for(
            lambda: (len(limits.unread), limits.num_calls, account.num_running) == (1, 0, 0),
            "the end of the call",
        )
        impatient.wait_no_requests()
        check_served(impatient)
        (stream,) = streams
        assert not silent.data(stream)
        silent.open_window(stream, 100_000)
        assert silent.wait_status(stream) == CODES.RESOURCE_EXHAUSTED.value[0]
        assert silent.data(stream), "the message that gRPC had when the call ended"
    impatient.wait_for(lambda: len(limits.unread) == 0, "nothing that is unread")


def test_a_call_without_its_message_ends(impatient: Stack) -> None:
    limits = impatient.grpc_server.limits
    with Http2Client(impatient.grpc_target) as silent:
        streams = [silent.call(GENERATE, None, KEY) for _ in range(NUM_PLACES + 5)]
        codes = {silent.wait_status(stream) for stream in streams}
        late, full = CODES.DEADLINE_EXCEEDED.value[0], CODES.RESOURCE_EXHAUSTED.value[0]
        assert late in codes <= {late, full}, "full only if the last come before the first end"
    impatient.wait_for(lambda: limits.num_calls == 0, "free places")
    check_served(impatient)


def test_calls_beyond_the_limit_are_refused_with_a_retry_time(keyed: Stack) -> None:
    with Http2Client(keyed.grpc_target) as silent:
        for _ in range(NUM_PLACES):
            silent.call(GENERATE, None, KEY)
        limits = keyed.grpc_server.limits
        silent.wait_for(lambda: limits.num_calls == NUM_PLACES, "no place")
        with grpc.insecure_channel(keyed.grpc_target) as channel:
            stub = InferenceStub(channel)
            code, _, details = failure(lambda: stub.Generate(MESSAGE, metadata=KEY))
        assert code is CODES.RESOURCE_EXHAUSTED
        assert details["RetryInfo"].retry_delay.seconds >= 1
        assert check(keyed) == SERVING
    keyed.wait_for(lambda: limits.num_calls == 0, "free places")


def test_a_pool_ends_calls_when_their_time_is_over() -> None:
    pool = CallPool(4)

    async def last() -> None:
        async with pool.entered("a", limit_s=0.01):
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError, match=r"has lasted 0\.01 s"):
        asyncio.run(last())
    assert len(pool) == 0


def test_a_pool_lets_a_call_in_while_another_is_ending() -> None:
    """The time of the other is over, but its task has not ended yet."""
    pool, may_end = CallPool(1, burst_s=0.0), asyncio.Event()

    async def ending() -> None:
        async with pool.entered("a", limit_s=0.01):
            try:
                await asyncio.Event().wait()
            finally:
                await may_end.wait()

    async def work() -> None:
        other = asyncio.create_task(ending())
        await asyncio.sleep(0.05)
        async with pool.entered("b"):
            assert len(pool) == 2
        may_end.set()
        with pytest.raises(DeadlineExceededError):
            await other

    asyncio.run(work())


def test_a_pool_lets_a_burst_in() -> None:
    """Calls that have just come are not ended for others that come at the same time."""
    pool, ended = CallPool(2, burst_s=60.0), list[str]()

    async def last(name: str, leave: asyncio.Event) -> None:
        try:
            async with pool.entered(name):
                await leave.wait()
        except QueueFullError:
            ended.append(name)

    async def work() -> None:
        leave = asyncio.Event()
        tasks = [asyncio.create_task(last(name, leave)) for name in "abb"]
        await asyncio.sleep(0)
        assert len(pool) == 3
        pool._burst_s = 0.0
        tasks.append(asyncio.create_task(last("c", leave)))
        while len(ended) < 2:
            await asyncio.sleep(0)
        leave.set()
        await asyncio.gather(*tasks)

    asyncio.run(work())
    assert ended == ["b", "a"]


def test_frames_are_those_of_a_real_client(keyed: Stack) -> None:
    """The hand-made client gets what a library does, where it reads."""
    with Http2Client(keyed.grpc_target, window=100_000) as client:
        stream = client.call(GENERATE, MESSAGE.SerializeToString(), KEY)
        assert client.wait_status(stream) == 0
        assert any(frame.kind == DATA for frame in client.frames)
