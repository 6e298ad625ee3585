"""Two gateway replicas behind one port each for HTTP and gRPC: one dies, or freezes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import psutil
import pytest

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.server import WAIT_S, Served, parse_address, running_server
from benchmarks.harness.stalls import wait_until
from cluster.launch.orphans import find_by_files
from protos import admin_pb2
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import request_of
from tests.harness.fault_rows import stopped

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TOKENS = 1000
MANY_TOKENS = 3500
"""Of streams that must outlast ``DETECTION_LIMIT_S``."""
NUM_STREAMS = 6
"""Of each protocol."""
MOST_CHANNELS = 60
"""Until both replicas have some: the kernel gives out connections at random."""
DETECTION_LIMIT_S = 10.0


@dataclass(slots=True)
class Stream:
    """What one client got."""

    tokens: list[int] = field(default_factory=list)
    is_done: bool = False
    """It came to its end."""
    error: str = ""
    """How it broke: an HTTP client's error, or a gRPC code."""
    began: threading.Event = field(default_factory=threading.Event)
    """The first token came, or the end."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = ["--num-gateway-replicas", "2", "--deterministic"]
    words += ["--detection-limit-s", f"{DETECTION_LIMIT_S:g}"]
    admin_http, admin_grpc = free_ports(2)
    words += ["--admin-port", str(admin_http), "--admin-grpc-port", str(admin_grpc)]
    words += ["--state-dir", str(tmp_path_factory.mktemp("stored") / "state"), "--debug-headers"]
    with running_server(tmp_path_factory.mktemp("state"), *words) as server:
        yield server
        server.wait_idle()


def replicas(server: Served) -> list[int]:
    """Processes of the gateway replicas that live."""
    found = [psutil.Process(p.pid) for p in find_by_files(server.folder)]
    names = [(p.pid, p.cmdline()[:1]) for p in found]
    return sorted(pid for pid, name in names if name and "ServeReplica:expertmesh" in name[0])


def wait_replicas(server: Served, without: int = 0) -> list[int]:
    """Until two replicas live and answer, none of them the given process."""
    seen: set[int] = set()
    pids: list[int] = []

    def are_here() -> bool:
        pids[:] = [pid for pid in replicas(server) if pid != without]
        seen.update(int(g["pid"]) for g in server.status()["gateway"])
        return len(pids) == 2 and set(pids) <= seen

    wait_until(are_here, "two replicas")
    return pids


def test_replicas_share_their_ports(server: Served) -> None:
    """The admin ports too, where they were asked for: each replica answers there."""
    pids = wait_replicas(server)
    status = server.status()["gateway"][0]
    admin_grpc, admin_http = status["admin_grpc"], status["admin_http"]
    missing = set(pids)
    with ExitStack() as stack:
        for _ in range(MOST_CHANNELS):
            channel = grpc.insecure_channel(admin_grpc, (("grpc.use_local_subchannel_pool", 1),))
            stub = AdminStub(stack.enter_context(channel))
            found = stub.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=WAIT_S)
            assert len(found.workers) == 3
            missing -= {p for p in missing if num_connections(p, parse_address(admin_grpc)[1])}
            if not missing:
                break
        assert not missing
    missing = set(pids)
    for _ in range(MOST_CHANNELS):
        with httpx.Client(base_url=f"http://{admin_http}", timeout=WAIT_S) as client:
            assert client.get("/admin/v1/operations").status_code == 200
            missing -= {p for p in missing if num_connections(p, parse_address(admin_http)[1])}
        if not missing:
            break
    assert not missing


def test_each_replica_continues_responses_of_both(server: Served) -> None:
    wait_replicas(server)
    seen: set[str] = set()
    first = previous = ""
    for number in range(MOST_CHANNELS):
        body = {"input": str(number), "max_output_tokens": 1, "ignore_eos": True}
        if previous:
            body["previous_response_id"] = previous
        with httpx.Client(base_url=server.http, timeout=WAIT_S) as client:  # any replica
            answer = client.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        previous = answer.json()["id"]
        first = first or previous
        seen.add(answer.headers["x-expertmesh-replica"])
        if len(seen) == 2 and number:
            break
    assert len(seen) == 2
    items = server.client.get(f"/v1/responses/{previous}/input_items", params={"limit": 100})
    assert len(items.json()["data"]) == 2 * number + 1
    assert server.client.delete(f"/v1/responses/{first}").status_code == 200
    assert server.client.get(f"/v1/responses/{first}").status_code == 404


def test_any_replica_reports_both_and_ends_requests_of_both(server: Served) -> None:
    pids = wait_replicas(server)
    admin_grpc = server.status()["gateway"][0]["admin_grpc"]
    wait_until(lambda: {int(g["pid"]) for g in server.status()["gateway"]} == set(pids), "both")
    text = httpx.get(f"{server.http}/metrics", timeout=WAIT_S).text
    lines = [n for n in text.splitlines() if n.startswith("expertmesh:generation_tokens_total{")]
    assert len(lines) == 2, lines
    names = [f"to-end-{number}" for number in range(4)]
    body = {"prompt": "ROMEO:", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    with ExitStack() as stack:
        streams = []
        for name in names:  # each on a connection of its own: any replica
            client = stack.enter_context(httpx.Client(base_url=server.http, timeout=WAIT_S))
            call = client.stream(
                "POST", "/v1/completions", json=body, headers={"x-request-id": name}
            )
            streams.append(stack.enter_context(call).iter_lines())
            assert next(streams[-1]).startswith("data: ")
        stub = AdminStub(stack.enter_context(grpc.insecure_channel(admin_grpc)))
        request = admin_pb2.AbortRequestsRequest(request_ids=names)
        assert list(stub.AbortRequests(request, timeout=WAIT_S).aborted) == names
        for lines_left in streams:
            *_, error, done = [line for line in lines_left if line]
            assert "request_aborted" in error
            assert done == "data: [DONE]"


def read_http(server: Served, stream: Stream, num_tokens: int) -> None:
    """One completion over HTTP, on a connection of its own."""
    body = {
        "prompt": "ROMEO:",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    try:
        with (
            httpx.Client(base_url=server.http, timeout=WAIT_S) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                take_event(stream, line)
    except httpx.TransportError as err:
        stream.error = type(err).__name__
    finally:
        if not stream.is_done:
            stream.error = stream.error or "ended early"
        stream.began.set()


def take_event(stream: Stream, line: str) -> None:
    """A line of server-sent events."""
    if line == "data: [DONE]":
        stream.is_done = not stream.error
    elif line.startswith("data: "):
        event: dict[str, Any] = json.loads(line[6:])
        if "error" in event:
            stream.error = event["error"]["code"]
            return
        stream.tokens += event["choices"][0].get("token_ids") or []
        stream.began.set()


def read_grpc(server: Served, stream: Stream, num_tokens: int) -> None:
    """One generation over gRPC, on a connection of its own."""
    wanted = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    options = (("grpc.use_local_subchannel_pool", 1),)
    try:
        with grpc.insecure_channel(server.grpc, options=options) as channel:
            request = request_of(text="ROMEO:", sampling_params=wanted)
            for chunk in InferenceStub(channel).GenerateStream(request, timeout=WAIT_S):
                stream.tokens += chunk.token_ids
                stream.began.set()
        stream.is_done = True
    except grpc.RpcError as err:
        stream.error = err.code().name
    finally:
        stream.began.set()


class Clients:
    """Streams over both protocols, in threads."""

    def __init__(
        self, server: Served, pool: ThreadPoolExecutor, num_tokens: int = NUM_TOKENS
    ) -> None:
        self.http: list[Stream] = []
        self.grpc: list[Stream] = []
        self._server = server
        self._pool = pool
        self._num_tokens = num_tokens
        self._threads: list[Future[None]] = []

    def begin(self, pids: list[int]) -> None:
        """Open streams until each of these replicas has some; returns when all flow."""
        for _ in range(NUM_STREAMS):
            self._open(read_http, self.http)
            self._open(read_grpc, self.grpc)
        port = parse_address(self._server.grpc)[1]
        while not all(num_connections(pid, port) for pid in pids):
            assert len(self.grpc) < MOST_CHANNELS
            self._open(read_grpc, self.grpc)

    def finish(self) -> None:
        """Wait for all their ends."""
        for thread in self._threads:
            thread.result(WAIT_S)

    def _open(self, read: Callable[[Served, Stream, int], None], streams: list[Stream]) -> None:
        stream = Stream()
        streams.append(stream)
        self._threads.append(self._pool.submit(read, self._server, stream, self._num_tokens))
        assert stream.began.wait(WAIT_S)


def num_connections(pid: int, port: int) -> int:
    """Clients of a process's port."""
    found = psutil.Process(pid).net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in found)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(NUM_STREAMS + MOST_CHANNELS) as pool:
        yield pool


def calm_tokens(server: Served, num_tokens: int = NUM_TOKENS) -> list[int]:
    """What every stream says where nothing happens."""
    stream = Stream()
    read_grpc(server, stream, num_tokens)
    assert stream.is_done
    assert len(stream.tokens) == num_tokens
    return stream.tokens


def check(clients: Clients, expected: list[int]) -> int:
    """Each stream is whole, or broke with an error that a client may try again; how many broke."""
    for stream in (*clients.http, *clients.grpc):
        if stream.is_done:
            assert stream.tokens == expected
        else:
            assert stream.tokens == expected[: len(stream.tokens)]
    broken = [s.error for s in clients.grpc if not s.is_done]
    assert set(broken) <= {"UNAVAILABLE"}
    assert len(broken) < len(clients.grpc), "the other replica had some"
    return len(broken)


def test_a_killed_replica_breaks_its_streams_and_no_others(
    server: Served, pool: ThreadPoolExecutor
) -> None:
    expected = calm_tokens(server)
    pids = wait_replicas(server)
    clients = Clients(server, pool)
    clients.begin(pids)
    os.kill(pids[0], signal.SIGKILL)
    clients.finish()
    assert check(clients, expected) > 0
    broken = {stream.error for stream in clients.http if not stream.is_done}
    assert broken <= {"RemoteProtocolError", "ReadError"}, "its connections end with it"
    server.wait_idle()
    again = Clients(server, pool)
    again.begin(wait_replicas(server, pids[0]))  # another one has come in its place
    again.finish()
    assert all(stream.is_done for stream in (*again.http, *again.grpc))
    check(again, expected)
    assert server.status()["generation"] == 1


def test_a_frozen_replica_holds_up_no_other(server: Served, pool: ThreadPoolExecutor) -> None:
    """The engine gives its requests up; when it wakes up, it goes on with them, or is gone."""
    expected = calm_tokens(server, MANY_TOKENS)
    pids = wait_replicas(server)
    clients = Clients(server, pool, MANY_TOKENS)
    before = server.engine()["choices_abort_total"]
    clients.begin(pids)
    ours = server.client.get("/health").headers["x-expertmesh-replica"]  # this connection stays
    (frozen,) = [int(g["pid"]) for g in server.status()["gateway"] if g["name"] != ours]
    with stopped(frozen):
        server.wait_engine("choices_abort_total", before + 1)
        server.wait_idle()
        streams = (*clients.http, *clients.grpc)
        wait_until(lambda: any(stream.is_done for stream in streams), "the end of a stream")
        assert not all(stream.is_done for stream in streams)
    clients.finish()
    check(clients, expected)
    server.wait_idle()
    assert server.status()["generation"] == 1
