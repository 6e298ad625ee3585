"""The engine stream against gateways that are not ours, and against bytes that are no message."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
from msgspec import structs

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN, EngineStream
from cluster.core.addresses import split_address, tune_socket
from cluster.core.release import RELEASE
from tests.harness.http2_client import Http2Client
from tests.workers.process.test_gateway_silence import FACTS
from workers.kv.block_pool import HashChanges
from workers.process import engine_server
from workers.process.engine_server import EngineServer
from workers.process.intake.commands import (
    AddRequest,
    CopyRequested,
    GatewayCommand,
    Inbox,
    PrefetchRequested,
)
from workers.requests.block_hash import KvEvents, block_hashes
from workers.requests.request import Request, SamplingParams, StepOutput, TokenOutput
from workers.requests.stream_handshake import HELLO, Hello
from workers.requests.wire import FROM_ENGINE, PATH, TO_ENGINE, KeepCopy, Ping, Prefetch

OPTIONS = (16, socket.TCP_USER_TIMEOUT)  # TCP_THIN_LINEAR_TIMEOUTS has no name in Python
REQUEST = Request(request_id="r", prompt=(1, 2), params=SamplingParams())


@dataclass(slots=True)
class Case:
    """A server and a gateway that it serves throughout."""

    server: EngineServer
    address: str
    inbox: Inbox
    came: threading.Event
    stream: EngineStream

    def commands(self) -> list[GatewayCommand]:
        """What has come in, at least one command."""
        assert self.came.wait(TIMEOUT_S)
        self.came.clear()
        return self.inbox.take()

    def still_unsent(self) -> None:
        """Nothing has come back, although the server's thread is done with all it knew."""
        done = threading.Event()
        self.server._loop.call_soon_threadsafe(done.set)
        assert done.wait(TIMEOUT_S)
        assert self.server._calls

    def still_serves(self) -> None:
        """A request goes in, and its token comes back."""
        self.stream.send(REQUEST)
        added = [c for c in self.commands() if isinstance(c, AddRequest)]
        assert [c.request for c in added] == [REQUEST]
        output = TokenOutput(request_id="r", attempt=0, choice=0, index=0, token_ids=(5,))
        self.server.publish(added[0].gateway, StepOutput(outputs=(output,)))
        assert self.stream.next() == output


@pytest.fixture
def case() -> Iterator[Case]:
    came = threading.Event()
    inbox = Inbox(came.set)
    server = EngineServer("127.0.0.1", TOKEN, inbox, lambda: FACTS)
    address = server.start()
    stream = EngineStream(address)
    yield Case(server, address, inbox, came, stream)
    stream.close()
    server.stop()


@pytest.mark.parametrize("release", ["9.9.9", ""])
def test_a_gateway_of_another_release_is_refused_by_name(
    case: Case, release: str, caplog: pytest.LogCaptureFixture
) -> None:
    refused = EngineStream(case.address, release=release)
    with pytest.raises(ConnectionError) as caught:
        refused.next()
    theirs = f"release {release}" if release else "no release"
    told = f"{theirs} of test, {RELEASE} of attention-0: releases must be equal"
    assert told in str(caught.value)
    assert "UNAUTHENTICATED" in str(caught.value)
    assert told in caplog.text
    refused.close()
    case.still_serves()


def test_sockets_of_gateways_are_tuned_for_pauses_of_the_network(case: Case) -> None:
    """What was lost is sent again soon after the pause."""
    case.still_serves()
    with socket.socket() as tuned:
        tune_socket(tuned)
        expected = retransmission(tuned)
    port = split_address(case.address)[1]
    sockets = psutil.Process().net_connections("tcp")
    accepted = [s.fd for s in sockets if s.status == "ESTABLISHED" and s.laddr.port == port]
    assert accepted
    for fd in accepted:
        with socket.socket(fileno=os.dup(fd)) as gateway:
            assert retransmission(gateway) == expected


def retransmission(sock: socket.socket) -> list[int]:
    """Options for lost segments: linear pauses, and the time to give up."""
    return [sock.getsockopt(socket.IPPROTO_TCP, option) for option in OPTIONS]


def test_the_hello_has_the_facts(case: Case) -> None:
    case.still_serves()
    assert case.stream.hello.max_model_len == FACTS.max_model_len


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\xc1",
        TO_ENGINE.encode(Ping(number=1)),
        HELLO.encode(Hello(name="g" * 5000, release=RELEASE)),
    ],
)
def test_a_stream_without_a_valid_hello_is_refused(case: Case, first: bytes) -> None:
    refused = EngineStream(case.address, first=first)
    with pytest.raises(ConnectionError, match=r"the hello of an engine|in the handshake: at most"):
        refused.next()
    refused.close()
    case.still_serves()


def test_a_gateway_without_the_token_is_refused(case: Case) -> None:
    refused = EngineStream(case.address, token="wrong")
    with pytest.raises(ConnectionError, match="the cluster token differs"):
        refused.next()
    refused.close()
    case.still_serves()


@pytest.mark.parametrize("data", [b"", b"\xc1", TO_ENGINE.encode(REQUEST)[:-1], b"\x91\xa1x"])
def test_bytes_that_are_no_message_end_their_stream_alone(case: Case, data: bytes) -> None:
    other = EngineStream(case.address)
    other.send(REQUEST)
    assert case.commands()
    other.send_bytes(data)
    with pytest.raises(ConnectionError, match="not a message to an engine"):
        other.next()
    other.close()
    assert case.commands()  # the gateway has gone
    case.still_serves()


@pytest.mark.parametrize("is_fenced_first", [True, False])
def test_the_order_of_fence_and_admission_does_not_matter(
    case: Case, is_fenced_first: bool
) -> None:
    """A later generation serves, whichever thread comes first; an earlier one does not."""
    if is_fenced_first:
        case.server.close_streams(1)
    case.server.admit_streams(2)
    if not is_fenced_first:
        case.server.close_streams(1)
    admitted = EngineStream(case.address)
    admitted.send(REQUEST)
    assert case.commands()
    case.server.close_streams(3)
    case.server.admit_streams(3)
    admitted.wait_ended()
    refused = EngineStream(case.address)
    with pytest.raises(ConnectionError, match="may not serve now"):
        refused.next()
    for stream in (admitted, refused):
        stream.close()


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "num_hashes"), [(15, 16, 0), (40, 16, 2), (40, 0, 0), (65, 16, 0)]
)
def test_a_request_comes_with_the_hashes_of_its_prompt(
    num_tokens: int, block_size: int, num_hashes: int
) -> None:
    """None where requests share no blocks, nor for a prompt that is too long to be served."""
    facts = structs.replace(FACTS, kv_block_size=block_size)
    came = threading.Event()
    inbox = Inbox(came.set)
    server = EngineServer("127.0.0.1", TOKEN, inbox, lambda: facts)
    stream = EngineStream(server.start())
    request = structs.replace(REQUEST, prompt=tuple(range(num_tokens)))
    stream.send(request)
    assert came.wait(TIMEOUT_S)
    (added,) = inbox.take()
    assert isinstance(added, AddRequest)
    assert len(added.hashes) == num_hashes
    assert list(added.hashes) == (block_hashes(request, 16, None) if num_hashes else [])
    stream.close()
    server.stop()


def test_a_prefetch_comes_with_the_hashes_of_each_open_choice() -> None:
    came = threading.Event()
    inbox, facts = Inbox(came.set), structs.replace(FACTS, kv_block_size=16)
    server = EngineServer("127.0.0.1", TOKEN, inbox, lambda: facts)
    stream = EngineStream(server.start())
    outputs = ((1,) * 11, (2,) * 12, (3,) * 30)
    request = structs.replace(
        REQUEST, prompt=tuple(range(20)), n=3, output_so_far=outputs, closed_choices=(2,)
    )
    stream.send(Prefetch(request=request))
    assert came.wait(TIMEOUT_S)
    (asked,) = inbox.take()
    stream.close()
    server.stop()
    assert isinstance(asked, PrefetchRequested)
    assert [len(chain) for chain in asked.chains] == [1, 2], "the newest token completes one"
    assert asked.chains[0][0] == asked.chains[1][0] == block_hashes(request, 16, None)[0]


def test_copies_to_keep_come_as_they_were_sent(case: Case) -> None:
    message = KeepCopy(source="attention-1", names=bytes(64), num_prompt=1, session="s")
    case.stream.send(message)
    (asked,) = case.commands()
    assert isinstance(asked, CopyRequested)
    assert asked.message == message


def test_held_outputs_are_sent_in_order_when_they_are_released(case: Case) -> None:
    """What somebody else must tell at once takes them along."""
    case.stream.send(REQUEST)
    (added,) = case.commands()
    assert isinstance(added, AddRequest)
    outputs = [
        TokenOutput(request_id="r", attempt=0, choice=0, index=i, token_ids=(i,)) for i in range(5)
    ]

    def publish(*indices: int) -> None:
        for i in indices:
            case.server.publish(added.gateway, StepOutput(outputs=(outputs[i],)))

    case.server.hold()
    publish(0, 1)
    case.still_unsent()
    case.server.release()
    publish(2)
    case.server.hold()
    publish(3)
    case.server.admit_streams(1)
    publish(4)
    assert [case.stream.next() for _ in outputs] == outputs


def test_a_call_that_fails_keeps_no_other_from_the_loop(case: Case) -> None:
    case.stream.send(REQUEST)
    (added,) = case.commands()
    assert isinstance(added, AddRequest)
    output = TokenOutput(request_id="r", attempt=0, choice=0, index=0, token_ids=(5,))

    def fail() -> None:
        raise RuntimeError("on purpose")

    case.server.hold()
    case.server._publish(fail)
    case.server.publish(added.gateway, StepOutput(outputs=(output,)))
    case.server.release()
    assert case.stream.next() == output


def test_the_number_of_free_blocks_is_known_only_once_it_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """New fetch costs, with which nothing is sent, hide no change."""
    server = EngineServer("127.0.0.1", TOKEN, Inbox(lambda: None), lambda: FACTS)
    sent: list[bytes] = []
    monkeypatch.setattr(server._streams, "put_all", sent.append)
    for cost, num_free in ((0.5, 100), (0.6, 80), (0.7, 64)):
        server.publish_kv(HashChanges(stored=(), removed=()), cost, num_free)
        server._run_calls()
    server._loop.close()
    messages = [FROM_ENGINE.decode(data) for data in sent]
    assert [m.num_free for m in messages if isinstance(m, KvEvents)] == [100, 64]


def test_callers_that_do_not_read_leave_their_handshakes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway takes the place of the oldest, and what they wait for is forgotten."""
    monkeypatch.setattr(engine_server, "MAX_HANDSHAKES", 32)
    case.still_serves()  # its own handshake is over
    hello = HELLO.encode(Hello(name="silent", nonce="n", release=RELEASE))
    pending = case.server._handshakes
    with Http2Client(case.address, window=0) as silent:
        for _ in range(32):
            silent.call(PATH, hello)
        silent.wait_for(lambda: len(pending) == 32, "their handshakes")
        case.still_serves()
        case.inbox.take()
        case.came.clear()
        another = EngineStream(case.address)
        another.send(REQUEST)
        assert [c.request for c in case.commands() if isinstance(c, AddRequest)] == [REQUEST]
        assert len(pending) == 31
        monkeypatch.setattr(engine_server, "HANDSHAKE_LIMIT_S", 0.0)
        silent.wait_for(lambda: not pending, "their end")
        another.close()
