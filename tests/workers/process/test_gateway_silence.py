"""Frozen gateways with their streams open."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import pytest

from cluster.core.release import RELEASE
from tests.harness.engine_stream import TIMEOUT_S, TOKEN
from workers.process.engine_server import EngineServer
from workers.process.gateway_silence import GatewaySilence
from workers.process.intake.commands import Command, GatewayGone, Inbox
from workers.requests.stream_handshake import GatewayHandshake
from workers.requests.wire import PATH, TO_ENGINE, EngineHello, Ping

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
    num_heads=1,
    labels=(),
    pad_token_id=None,
    problem_type="",
    banks=(),
    kv_block_size=16,
    kv_length_matters_above=None,
)


def test_a_gateway_that_pinged_once_must_not_fall_silent() -> None:
    silence = GatewaySilence(5.0)
    silence.heard("a", 10.0, is_ping=True)
    silence.heard("b", 10.0, is_ping=False)  # it never pings
    silence.heard("c", 10.0, is_ping=True)
    silence.heard("c", 14.0, is_ping=False)
    assert silence.look(15.0, 14.0) == []
    assert silence.look(15.1, 14.1) == ["a"]
    silence.forget("a")
    assert silence.look(19.1, 18.1) == ["c"]


def test_what_was_said_while_we_stood_still_is_waited_for() -> None:
    silence = GatewaySilence(5.0)
    silence.heard("a", 10.0, is_ping=True)
    assert silence.look(40.0, 11.0) == []  # 28 s late
    assert silence.look(41.0, 40.0) == []
    assert silence.look(44.1, 43.1) == ["a"]


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
            outgoing.put(handshake.answer(next(answers)))
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
    taken: list[Command] = inbox.take()
    assert len(taken) == 1
    assert isinstance(taken[0], GatewayGone)
    assert taken[0].gateway.startswith("gateway-7#")
    server.stop()
