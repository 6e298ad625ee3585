"""The worker's end of the control socket, against the real control server on loopback."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.harness.members import member_of
from cluster.actors.control_server import ControlServer
from cluster.core.errors import HandshakeError, PeerLostError, SupersededError
from cluster.core.frames import (
    Alive,
    ControlFrame,
    Heartbeat,
    HeartbeatAck,
    NewGeneration,
    Register,
    RunGeneration,
    Shutdown,
    StatusReply,
    StatusRequest,
    Superseded,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
)
from cluster.core.placement import ExpertPlacement
from cluster.core.release import RELEASE
from cluster.core.topology import Generation
from expertmesh.loop_thread import LoopThread
from tests.cluster.controller.load_reports import load_of
from workers.process.control import control_client
from workers.process.control.control_client import ControlClient
from workers.process.control.lease import Lease

TOKEN = "a token"
LIMIT_S = 60.0


class ServerThread:
    """A control server with an event loop of its own; what happens is queued."""

    def __init__(self, release: str = RELEASE) -> None:
        self.frames: queue.Queue[tuple[str, ControlFrame]] = queue.Queue()
        self.closed: queue.Queue[tuple[str, str]] = queue.Queue()
        self.acknowledges = True
        self._thread = LoopThread(LIMIT_S)
        self.server = ControlServer(TOKEN, self, release=release)
        self.address = self.run(self.server.start("127.0.0.1"))

    def run(self, work: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return self._thread.run(work)

    def send(self, frame: ControlFrame, worker: str) -> None:
        """Send to one worker."""
        self._thread.loop.call_soon_threadsafe(self.server.send, frame, worker)

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        self.frames.put((worker, frame))
        if isinstance(frame, Heartbeat) and self.acknowledges:
            self.server.send(HeartbeatAck(term=1, number=frame.number), worker)

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        self.closed.put((worker, reason))

    def next(self, kind: type[ControlFrame]) -> ControlFrame:
        """The next frame of a kind."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            _, frame = self.frames.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(frame, kind):
                return frame

    def close(self) -> None:
        """End server, loop and thread."""
        self.run(self.server.close())
        self._thread.close()


@pytest.fixture
def server() -> Iterator[ServerThread]:
    thread = ServerThread()
    yield thread
    thread.close()


LARGE = Generation(number=1, members=(member_of("expert-0", node="x" * 300_000),))
NO_MAPS = ExpertPlacement(epoch=1, banks=())
LOAD = load_of(4, [4])


def _heartbeat() -> Heartbeat:
    return Heartbeat(progress=1, idle=True, generation=0)


def _status() -> StatusReply:
    return StatusReply(token=0, stats={"kv_blocks_free": 9.0}, expert_load=LOAD)


def _client(
    address: str,
    on_frame: Callable[[ControlFrame], None] = lambda frame: None,
    *,
    token: str = TOKEN,
    heartbeat: Callable[[], Heartbeat] = _heartbeat,
    **more: Any,
) -> ControlClient:
    return ControlClient(
        address,
        token,
        "expert-0",
        on_frame,
        heartbeat=heartbeat,
        status=_status,
        heartbeat_s=more.pop("heartbeat_s", 0.05),
        connect_timeout_s=more.pop("connect_timeout_s", LIMIT_S),
        **more,
    )


def test_frames_go_both_ways(server: ServerThread) -> None:
    got: queue.Queue[ControlFrame] = queue.Queue()
    client = _client(server.address, got.put)
    client.start()
    client.send(Register(member=member_of("expert-0")))
    assert server.next(Register) == Register(member=member_of("expert-0"))
    orders: list[ControlFrame] = [
        NewGeneration(term=1, generation=LARGE, placement=NO_MAPS),
        RunGeneration(generation=1, first_step=1),
        Shutdown(reason="enough"),
    ]
    for order in orders:
        server.send(order, "expert-0")
    assert [got.get(timeout=LIMIT_S) for _ in orders] == orders
    client.close()
    assert server.closed.get(timeout=LIMIT_S) == ("expert-0", "closed by the peer")


def test_heartbeats_come_at_their_interval(server: ServerThread) -> None:
    client = _client(server.address, heartbeat_s=0.05)
    began = time.monotonic()
    client.start()
    for _ in range(5):
        server.next(Heartbeat)
    took = time.monotonic() - began
    client.close()
    assert took > 0.15


def test_it_shows_that_it_lives_between_heartbeats(server: ServerThread) -> None:
    client = _client(server.address, heartbeat_s=60.0, alive_s=0.02)
    client.start()
    frames = [server.frames.get(timeout=LIMIT_S)[1] for _ in range(4)]
    client.close()
    assert [type(frame) for frame in frames] == [Heartbeat, Alive, Alive, Alive]


@pytest.mark.parametrize("alive_s", [0.02, 60.0])
def test_heartbeats_come_whatever_is_between_them(server: ServerThread, alive_s: float) -> None:
    client = _client(server.address, heartbeat_s=0.05, alive_s=alive_s)
    client.start()
    for _ in range(3):
        server.next(Heartbeat)
    client.close()


def test_a_status_request_is_answered_at_once(server: ServerThread) -> None:
    client = _client(server.address, heartbeat_s=60.0)
    client.start()
    server.next(Heartbeat)
    server.send(StatusRequest(token=77), "expert-0")
    assert server.next(StatusReply) == StatusReply(
        token=77, stats={"kv_blocks_free": 9.0}, expert_load=LOAD
    )
    client.close()


def test_a_controller_of_another_release_is_refused_by_name() -> None:
    other = ServerThread(release="9.9.9")
    with pytest.raises(HandshakeError) as caught:
        _client(other.address).start()
    assert str(caught.value) == (
        f"release 9.9.9 of the controller, {RELEASE} of expert-0: releases must be equal"
    )
    assert other.closed.empty()
    other.close()


def test_what_is_queued_at_close_still_arrives(server: ServerThread) -> None:
    client = _client(server.address)
    client.start()
    client.send(WorkerFailed(reason="out of memory"))
    client.close()
    assert server.next(WorkerFailed) == WorkerFailed(reason="out of memory")


def test_a_wrong_token_is_refused(server: ServerThread) -> None:
    client = _client(server.address, token="another")
    with pytest.raises(HandshakeError, match="does not know the cluster token"):
        client.start()
    client.close()


def test_no_controller_is_an_error_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        client = _client(address, connect_timeout_s=0.2)
        with pytest.raises(PeerLostError, match="handshake with"):
            client.start()
    client = _client(address, connect_timeout_s=0.2)
    with pytest.raises(PeerLostError, match="cannot connect to"):
        client.start()


def test_a_controller_that_closes_the_first_connections_is_called_again(
    server: ServerThread,
) -> None:
    """A controller with many callers closes the oldest of them."""
    with socket.create_server(("127.0.0.1", 0)) as busy, ThreadPoolExecutor(1) as pool:
        client = _client(f"127.0.0.1:{busy.getsockname()[1]}")
        start = pool.submit(client.start)
        busy.accept()[0].close()
        second, _ = busy.accept()
        client.redirect(server.address)
        second.close()
        start.result(LIMIT_S)
    server.next(Heartbeat)
    client.close()


def test_a_broken_callback_is_reported_to_the_controller(server: ServerThread) -> None:
    failed: queue.Queue[str] = queue.Queue()

    def fail() -> Heartbeat:
        raise ValueError("no engine")

    client = _client(server.address, heartbeat=fail, on_failed=failed.put)
    client.start()
    assert server.next(WorkerFailed) == WorkerFailed(reason="ValueError: no engine")
    assert failed.get(timeout=LIMIT_S) == "ValueError: no engine"
    client.close()


class LostConnections(logging.Handler):
    """Reasons for which the client has logged the loss of its connection."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("lost the controller"):
            self.reasons.put(record.getMessage().removeprefix("lost the controller: "))


@pytest.fixture
def lost() -> Iterator[queue.Queue[str]]:
    handler = LostConnections()
    control_client.logger.addHandler(handler)
    yield handler.reasons
    control_client.logger.removeHandler(handler)


def _standing() -> WorkerReport:
    return WorkerReport(
        generation=None, placement=None, running=True, highest_step=7, highest_epoch=2
    )


@pytest.mark.parametrize("is_first_gone", [True, False], ids=["gone", "still there"])
def test_a_new_controller_that_calls_gets_everything(
    lost: queue.Queue[str], is_first_gone: bool
) -> None:
    first, second = ServerThread(), ServerThread()
    client = _client(first.address, worker_report=lambda: [_standing()])
    client.start()
    client.send(Register(member=member_of("expert-0")))
    client.send(WorkerReady(info={"bytes": 5}))
    first.next(WorkerReady)
    client.check_term(1, "")  # whether or not an acknowledgement has come
    if is_first_gone:
        first.close()
        assert lost.get(timeout=LIMIT_S)
    client.redirect(second.address)
    client.redirect(second.address)
    assert second.next(Register) == Register(member=member_of("expert-0"))
    assert second.next(WorkerReady) == WorkerReady(info={"bytes": 5})
    assert second.next(WorkerReport) == _standing()
    if not is_first_gone:
        assert first.next(Superseded) == Superseded(term=1)
        assert first.closed.get(timeout=LIMIT_S)[0] == "expert-0"
        assert lost.get(timeout=LIMIT_S) == "a new controller has taken over"
        first.close()
    second.next(Heartbeat)
    second.next(Heartbeat)
    assert lost.empty()
    assert second.closed.empty()
    client.close()
    second.close()


def test_close_ends_the_search_for_a_controller(lost: queue.Queue[str]) -> None:
    before = set(threading.enumerate())
    server = ServerThread()
    client = _client(server.address)
    client.start()
    server.close()
    assert lost.get(timeout=LIMIT_S)
    client.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), thread.name


def test_an_older_term_is_not_followed(server: ServerThread) -> None:
    got: queue.Queue[ControlFrame] = queue.Queue()
    client = _client(server.address, got.put, heartbeat_s=60.0)
    server.acknowledges = False
    client.start()
    server.next(Heartbeat)
    server.send(NewGeneration(term=3, generation=LARGE, placement=NO_MAPS), "expert-0")
    assert isinstance(got.get(timeout=LIMIT_S), NewGeneration)
    server.send(NewGeneration(term=2, generation=LARGE, placement=NO_MAPS), "expert-0")
    assert server.next(Superseded) == Superseded(term=3)
    assert server.closed.get(timeout=LIMIT_S)[0] == "expert-0"
    assert got.empty()
    with pytest.raises(SupersededError, match="a controller of the older term 2"):
        client.check_term(2, "")
    client.close()


def test_acknowledged_heartbeats_renew_the_lease_and_nothing_else(server: ServerThread) -> None:
    fenced: queue.Queue[str] = queue.Queue()
    lease = Lease(limit_s=0.3, last_commit=lambda: 0.0, on_expired=fenced.put)
    client = _client(server.address, lease=lease)
    client.start()
    began = client.contact_at
    while client.contact_at == began:
        server.next(Heartbeat)
    server.acknowledges = False
    while fenced.empty():
        server.send(StatusRequest(token=1), "expert-0")
        server.next(Heartbeat)
    assert "no contact with the controller" in fenced.get()
    client.close()


def test_what_answers_without_being_a_controller_is_passed_over(
    server: ServerThread, lost: queue.Queue[str]
) -> None:
    """Another program may listen on the port of a controller that has gone."""
    client = _client(server.address)
    client.start()
    with socket.create_server(("127.0.0.1", 0)) as other:
        client.redirect(f"127.0.0.1:{other.getsockname()[1]}")
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request")
            client.redirect(server.address)
            assert lost.get(timeout=LIMIT_S) == "a new controller has taken over"
    while not server.frames.empty():
        server.frames.get()
    server.next(Heartbeat)
    client.close()


def test_the_thread_does_not_end_in_silence(server: ServerThread, lost: queue.Queue[str]) -> None:
    failed: queue.Queue[str] = queue.Queue()

    def report() -> list[ControlFrame]:
        raise ValueError("no maps")

    client = _client(server.address, worker_report=report, on_failed=failed.put)
    client.start()
    server.next(Heartbeat)
    server.run(_drop(server.server))
    assert server.next(WorkerFailed) == WorkerFailed(reason="ValueError: no maps")
    assert failed.get(timeout=LIMIT_S) == "ValueError: no maps"
    client.close()


async def _drop(server: ControlServer) -> None:
    server.drop("expert-0")
