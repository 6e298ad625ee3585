"""Frozen gateways with their streams open."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import pytest

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN
from cluster.core.release import RELEASE
from workers.process.engine_server import EngineServer
from workers.process.gateway_streams import GatewayStreams
from workers.process.intake.commands import GatewayCommand, GatewayDisconnected, Inbox
from workers.requests.stream_handshake import GatewayHandshake
from workers.requests.wire import PATH, TO_ENGINE, Abort, EngineHello, Ping

FACTS = EngineHello(
    worker="attention-0",
    generation=1,
    max_model_len=64,
    vocab_size=32,
    eos_token_ids=(1,),
    max_kv_tokens=128,
    dtype="float32",
    model_type="olmoe",
    hidden_size=8,
    num_layers=1,
    num_attention_layers=1,
    num_heads=1,
    labels=(),
    pad_token_id=None,
    problem_type="",
    banks=(),
    kv_block_size=16,
    kv_length_matters_above=None,
)


def _dropped(streams: GatewayStreams, inbox: Inbox, now: float, looked_at: float) -> list[str]:
    """Gateways that a check drops."""
    inbox.take()
    streams.drop_silent(now, looked_at)
    gone = [command for command in inbox.take() if isinstance(command, GatewayDisconnected)]
    return [command.gateway.partition("#")[0] for command in gone]


def test_a_gateway_that_pinged_once_must_not_fall_silent(inbox: Inbox) -> None:
    streams = GatewayStreams(inbox, 5.0)
    a, b, c = (streams.open(name, lambda: None) for name in "abc")
    streams.handle_message(Ping(number=1), a, 10.0)
    streams.handle_message(Abort(request_id="r"), b, 10.0)  # it never pings
    streams.handle_message(Ping(number=1), c, 10.0)
    streams.handle_message(Abort(request_id="r"), c, 14.0)
    assert _dropped(streams, inbox, 15.0, 14.0) == []
    assert _dropped(streams, inbox, 15.1, 14.1) == ["a"]
    assert _dropped(streams, inbox, 19.1, 18.1) == ["c"]


def test_what_was_said_while_we_stood_still_is_waited_for(inbox: Inbox) -> None:
    streams = GatewayStreams(inbox, 5.0)
    streams.handle_message(Ping(number=1), streams.open("a", lambda: None), 10.0)
    assert _dropped(streams, inbox, 40.0, 11.0) == []  # 28 s late
    assert _dropped(streams, inbox, 41.0, 40.0) == []
    assert _dropped(streams, inbox, 44.1, 43.1) == ["a"]


def test_time_in_which_we_are_late_again_and_again_is_no_silence(inbox: Inbox) -> None:
    streams = GatewayStreams(inbox, 5.0)
    streams.handle_message(Ping(number=1), streams.open("a", lambda: None), 10.0)
    now, each = 10.0, 1.9 * streams.check_interval_s
    while now < 18.0:
        now += each
        assert _dropped(streams, inbox, now, now - each) == []


@pytest.fixture
def inbox() -> Inbox:
    return Inbox(lambda: None)


def test_a_gateway_that_falls_silent_is_dropped_with_its_stream_open(inbox: Inbox) -> None:
    said = threading.Event()
    server = EngineServer("127.0.0.1", TOKEN, inbox, lambda: FACTS, silence_limit_s=0.5)
    address = server.start()
    outgoing: queue.Queue[bytes | None] = queue.Queue()
    handshake = GatewayHandshake(TOKEN, "gateway-7", RELEASE)
    outgoing.put(handshake.start())

    def messages() -> Iterator[bytes]:
        while (message := outgoing.get()) is not None:
            yield message

    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(PATH, bytes, bytes)(messages(), timeout=TIMEOUT_S)

        def read() -> None:
            answers = iter(call)
            outgoing.put(handshake.prove(next(answers)))
            handshake.finish(next(answers))
            outgoing.put(TO_ENGINE.encode(Ping(number=1)))
            with pytest.raises(grpc.RpcError) as caught:
                for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.ABORTED
            said.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert said.wait(TIMEOUT_S)  # it learns that, should it still live
        outgoing.put(None)
        reader.join(TIMEOUT_S)
    taken: list[GatewayCommand] = inbox.take()
    assert len(taken) == 1
    assert isinstance(taken[0], GatewayDisconnected)
    assert taken[0].gateway.startswith("gateway-7#")
    server.stop()
